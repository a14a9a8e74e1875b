"""Adapters: Railwire inside other people's engines. They import the applications; nothing imports them."""
