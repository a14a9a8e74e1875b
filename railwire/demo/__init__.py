"""The demo behind `railwire demo`: a real model, prefilled in some processes and decoded in another, and a kill."""
