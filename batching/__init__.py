"""Who runs when: requests, policies, KV blocks, the scheduler and its driver. Pure Python; knows neither torch nor flask."""
