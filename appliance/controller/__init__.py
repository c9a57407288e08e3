"""The controller: one asyncio loop; home of asyncssh and of the web framework."""
