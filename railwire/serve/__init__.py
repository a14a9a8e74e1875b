"""Serving with prefill and decode apart: three kinds of process (prefill worker, decode worker, router) that speak
HTTP to each other and to clients, and move KV with Railwire. The commands are ``railwire serve
prefill|decode|router``."""
