"""What limits would do to a flood (``synapse-sticky simulate``, E3, H6).

``arrivals``, ``flood`` and ``synapse`` say what is played: from a file, by options, or from a
database. ``player`` plays it against a configuration, by the very code that decides in mode
``observe``. ``outcome`` has what came of it, ``drawing`` shows it.
"""
