"""Custom hosts of apps: whose a host is, how that is proven, and which certificate stands for it.

Routing by host is the business of `edge`; names under the base domain belong to their apps without any of this.
"""
