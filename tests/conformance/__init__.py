"""What MSC4354 asks of a homeserver, one test or a few for each requirement.

They use the client-server and the federation API alone, so that they can be pointed at any
homeserver; the other servers of a story are peers of the lab's own.
"""
