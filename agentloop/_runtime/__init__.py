"""
One invocation: its attempts, its outcome, and the reports of both.

A worker of a batch, or ``single``, runs a ``job``. Its base class in ``attempt`` calls the agent, and
``outcome`` describes an attempt that failed. ``states`` has the states of a job, ``options`` the settings
of a call, ``current`` the attempt as its agent sees it, and ``observer`` reports events and figures.
``lifetime`` is that of ``async with loop:``, and ``threads`` makes agents of blocking functions.
"""
