"""What a run is written and shown with, by the client and by the simulator alike: a plan's file, the figures, tables, the
style of charts, results.json, a trace.

Plain: these files import the standard library, numpy and matplotlib, and nothing of the client but each other.
"""
