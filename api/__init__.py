"""The HTTP side: one blueprint an audience. Turns requests into tickets of the batching loop and waits for them."""
