"""The same policies, scheduler and driver in virtual time: nothing sleeps, and every run is repeatable."""
