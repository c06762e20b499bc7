"""
Batches: the source of their invocations, the workers that run them, and how a batch ends.

``run_all`` makes a batch that keeps its results (``collect``). An invocation passes the modules in this
order:

1. ``batch`` opens the tasks, and ``crew`` activates a ``worker``.
2. The worker takes a job from ``inputs``, which pulls an input and makes a ``_runtime.job`` of it.
3. ``_limits.pool`` grants a slot, at once or after a wait in ``_limits.lines``.
4. ``_runtime.run`` calls the agent. ``_runtime.outcome`` describes a failure.
5. ``bookkeeping`` decides whether the job is finished or goes to ``retry_queue``, and from there to step 2.
6. ``_runtime.job`` makes the result. ``_runtime.observer`` reports it to ``_metrics`` and to ``on_event``.

Rarer things have modules of their own: async inputs (``feeder``), keys (``by_key``, ``room``), the reasons
of a stop (``ending``, ``timer``) and journals (``journaled``).
"""
