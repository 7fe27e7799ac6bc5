"""What every job does around its work: locks, logs, records, resumable state, and several processes that share it.

Knows nothing of compression; imported by whoever runs for long, never by methods.
"""
