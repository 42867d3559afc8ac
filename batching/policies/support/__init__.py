"""What single schemes stand on: plain bookkeeping and arithmetic, each file for the policy or two that name it."""
