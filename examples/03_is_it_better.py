"""How many paired episodes does it take to believe that one policy is better than another?"""

import numpy as np

from vla_post.evaluation.paired import PairedResult

random = np.random.default_rng(0)
for episodes in (10, 30, 100, 300):
    scenes = random.random(episodes)  # equal seeds: both policies meet the same difficulties
    result = PairedResult.from_outcomes(list(scenes < 0.6), list(scenes < 0.75))
    low, high = result.difference_interval()
    verdict = "better" if low > 0 else "not shown"
    print(
        f"{episodes:>4} episodes: {result.difference:+.0%} "
        f"({low:+.0%} to {high:+.0%}), p = {result.p_value:.2g}: {verdict}"
    )
