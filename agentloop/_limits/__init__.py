"""
How much may run: slots, rates, overload.

``limiter`` has the public class. Its state in one event loop is a ``pool``, and ``slots`` has the theory: a
slot is the right to run one attempt. ``lines`` holds the attempts that wait for one. ``admission`` has the
other conditions for an attempt: rates (``rates``, ``budget``), the provider (``_provider``) and the
``retry_budget``.

``away`` suspends the slots of agents that wait for others, ``work`` tells whether any attempt is at work,
and ``guard`` checks the limit. A ``keyed`` limiter has a pool for each key, and ``keys`` shares places
among them.
"""
