"""What the two sides say to each other, and the machines that decide: messages, and the states of tickets and pushes.

A machine is a function of (state, event) to (state, actions): no engine, no lock, no clock, no thread. The shells above
(``sender``, ``push``, ``delivery``; ``receiver``, ``ticket``) feed it events and carry out its actions.
"""
