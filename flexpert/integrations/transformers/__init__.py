"""Any mixture-of-experts model of `transformers` on Flexpert's operators.

`enable()` makes the experts implementation `flexpert` known; `enable(model)` also sets it. Importing this
package imports no `transformers`; its functions do.
"""

from __future__ import annotations

from .enable import enable

__all__ = ["enable"]
