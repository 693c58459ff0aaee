"""Text on one side, tokens on the other: what any front end (HTTP, batch, a script) needs around a `Generator`.

No HTTP, no Ray and no torch in here, so a front-end replica starts fast and stays small.
"""
