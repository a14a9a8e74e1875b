"""`railwire demo weights`: four trainers, two inference ranks, a real model, real steps; one trainer is killed."""
