"""The differences between asyncio and trio, behind one interface."""
