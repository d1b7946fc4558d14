"""How often two utterances of a batch are pushed apart though one speaker said both.

Only measured and logged; nothing that trains knows of speakers.
"""

import numpy as np
import numpy.typing as npt


class FalseNegatives:
    """The rate of false negatives among the pairs of different utterances of a batch.

    Args:
        speaker: int [N], codes of the speakers of the utterances that may be drawn by their id; -1 where unknown.
        usable: int [n], ids that are drawn; or only their number, where no speaker is known.
        num_speakers: an estimate of the number of speakers, for data without labels.
    """

    def __init__(
        self, speaker: npt.NDArray[np.int32], usable: npt.NDArray[np.int64] | int, num_speakers: int | None
    ) -> None:
        self._speaker = speaker
        self._num_speakers = num_speakers
        self._num_usable = usable if isinstance(usable, int) else len(usable)
        self._of_all = None if isinstance(usable, int) else self.rate(usable)

    @property
    def expected(self) -> float | None:
        """Rate in a batch drawn without replacement: of the labels, or of the estimate if speakers speak equally much.

        None without labels and without an estimate.

        >>> FalseNegatives(np.full(10, -1, np.int32), 10, 5).expected  # 1 of 9 others is of the speaker
        0.1111111111111111
        """
        if self._of_all is not None or self._num_speakers is None:
            return self._of_all
        return max(self._num_usable / self._num_speakers - 1, 0.0) / max(self._num_usable - 1, 1)

    def rate(self, ids: npt.NDArray[np.int64]) -> float | None:
        """Rate among the utterances of a batch whose speakers are known; None if fewer than two are.

        >>> FalseNegatives(np.array([0, 0, 1, -1], np.int32), np.arange(4), None).rate(np.array([0, 1, 2, 3]))
        0.3333333333333333
        """
        known = self._speaker[ids]
        known = known[known >= 0]
        if len(known) < 2:
            return None
        _, counts = np.unique(known, return_counts=True)
        return float((counts * (counts - 1)).sum() / (len(known) * (len(known) - 1)))
