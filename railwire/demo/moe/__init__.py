"""`railwire demo moe`: a small mixture-of-experts model over four processes, one of which dies."""
