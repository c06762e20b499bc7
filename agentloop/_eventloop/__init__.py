"""What differs between asyncio and trio, and how the library runs code on either."""
