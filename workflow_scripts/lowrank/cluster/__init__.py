"""What a job asks its cluster for: sizes of models, memory and time by rule, the plan of a whole study.

From shapes alone; imported by the rules, and by nothing else of the library.
"""
