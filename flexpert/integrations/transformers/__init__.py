"""Any mixture-of-experts model of `transformers` on Flexpert's operators.

`enable()` makes the experts implementation `flexpert` known; `enable(model)` also sets it. Importing this
package imports no `transformers`; its functions do.
"""

from __future__ import annotations

from .bias import bias_balancer
from .enable import enable
from .packed import prepack, unpack
from .probe import RouterCall, RouterProbe

__all__ = ["RouterCall", "RouterProbe", "bias_balancer", "enable", "prepack", "unpack"]
