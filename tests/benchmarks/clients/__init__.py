"""One module for each client, of the same shape:

``run(work, job, gauge)`` calls ``work``, one of the functions beside it, in the client's kind of event loop. These are
``receive``, ``publish``, ``round_trip``, ``reconnect``, ``subscriptions`` and ``drivers``, as far as the client can be
measured so; ``tests/benchmarks/catalogue.py`` says what it cannot, and why. Each uses the client as its documentation
says one should who wants it fast.

The modules of peers import them dynamically: they are in environments of their own, where no type checker looks.
"""
