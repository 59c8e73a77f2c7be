"""`python -m vla_post.training`: the learner process (see `vla_post.training.learner`)."""

import sys

from vla_post.training.signals import StopRequest

if __name__ == "__main__":
    request = StopRequest()
    request.listen()
    # Below, because this takes seconds, in which a signal must find its handler.
    from vla_post.training.learner import main

    request.loading = False
    sys.exit(main(stop=request))
