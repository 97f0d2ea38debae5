"""Any mixture-of-experts model of `transformers` on Flexpert's operators.

`enable()` makes the experts implementation `flexpert` known; `enable(model)` also sets it. Importing this
package imports no `transformers`; its functions do.
"""

from __future__ import annotations

from .balance import AttachedBalance, attach_balance
from .bias import bias_balancer
from .enable import enable
from .packed import prepack, unpack
from .probe import RouterCall, RouterProbe

__all__ = [
    "AttachedBalance",
    "RouterCall",
    "RouterProbe",
    "attach_balance",
    "bias_balancer",
    "enable",
    "prepack",
    "unpack",
]
