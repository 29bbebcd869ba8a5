"""Scoring a set of pictures: open what is compared, compute the scores, and report them with the protocol."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdiff.environment import choose_device
from dsdiff.images.folders import choose_framing, open_folder, open_source
from dsdiff.images.sets import FilePictures, PictureSet
from dsdiff.images.sources import PER_CLASS, SHAPES, SHAPES_SIDE, Size, size_text
from dsdiff.metrics.extractors import Extractor, Features, FeatureStore, choose_extractor
from dsdiff.metrics.options import EXTRACTORS, ScoringOptions, is_statistics
from dsdiff.metrics.pair_scores import Pairing, add_paired_scores, choose_scores, pair_up
from dsdiff.metrics.report import Report, ScoringProtocol
from dsdiff.metrics.scores import Scores
from dsdiff.metrics.set_scores import RNG_SEED, add_fid_difference, add_set_scores, gaussian_of
from dsdiff.metrics.statistics import Gaussian, read_statistics, write_statistics
from ldm.data.reader import STRIDE

logger = logging.getLogger(__name__)


def score(source: str, options: ScoringOptions) -> Report:
    """Return all scores of the pictures that `source` names, see `open_source`.

    Raises ValueError or OSError for what cannot be read or compared, and for options that would have no effect.
    """
    options.check_for(source)
    device = choose_device(options.device)
    pictures = open_pictures(source, options)
    pairing = open_pairing(source, options, pictures) if options.paired is not None else None
    reference = open_reference(options, pictures) if options.reference is not None else None
    # Before anything is computed, as a CLIP may not be there.
    of_pairs, notes = ({}, []) if pairing is None else choose_scores(pairing.first.size, device, options.clip)
    scores, extractor = Scores(), None
    if options.needs_features:
        extractor = open_extractor(source, options, reference, pictures)
        store = FeatureStore(extractor, device, options.batch_size, options.cache)
        _score_sets(scores, options, store, pictures, reference, pairing)
    if pairing is not None:
        scores.notes += notes
        add_paired_scores(
            scores,
            pairing,
            of_pairs,
            batch_size=options.batch_size,
            resamples=options.resamples,
            seed=options.seed,
        )
    protocol = ScoringProtocol(
        pictures=pictures.facts(),
        reference=None if reference is None else _reference_facts(reference, options.reference),
        paired=None if pairing is None else pairing.second.facts(),
        resize=str(pictures.framing),
        features=None if extractor is None else extractor.facts(),
        seed=options.seed,
        kid_and_is_seed=None if extractor is None else RNG_SEED,
    )
    return Report(source=source, protocol=protocol, scores=scores, label="" if extractor is None else extractor.label)


# --- what is compared --------------------------------------------------------------------------------------


def open_pictures(source: str, options: ScoringOptions) -> PictureSet:
    """Return the pictures to score, all of one size."""
    pictures = open_source(source, what="pictures", limit=options.n, per_class=options.per_class or PER_CLASS)
    return pictures.framed(choose_framing(options.resize, options.size, pictures))


def open_reference(options: ScoringOptions, pictures: PictureSet) -> PictureSet | Gaussian:
    """Return the reference: the content of a statistics file, or pictures of the size of `pictures`.

    Raises ValueError if that cannot be.
    """
    source = options.reference
    if source is None:
        raise ValueError("there is no reference: give a source or a statistics file")
    if is_statistics(source):
        return read_statistics(Path(source))
    per_class = options.per_class or PER_CLASS
    side = _shapes_side(pictures) if source == SHAPES else SHAPES_SIDE
    reference = open_source(
        source, what="reference", limit=options.reference_n, per_class=per_class, shapes_side=side
    ).framed(pictures.framing)
    if reference.size != pictures.size:
        raise ValueError(
            f"the pictures are {size_text(pictures.size)}, the reference is {size_text(reference.size)}: "
            "use --resize squash or center-crop"
        )
    return reference


def _shapes_side(pictures: PictureSet) -> int:
    width, height = pictures.size
    if width != height:
        raise ValueError(f"the pictures are {size_text(pictures.size)}, shapes are square: use --resize center-crop")
    return width


def open_pairing(source: str, options: ScoringOptions, pictures: PictureSet) -> Pairing:
    """Return the pairs of `pictures` and the folder `paired`.

    Raises ValueError if `pictures` are not files of one folder, if there is no such folder, or if nothing pairs.
    """
    if not isinstance(pictures, FilePictures):
        raise ValueError(f"--paired pairs the files of two folders, and {source!r} is not one")
    if options.paired is None or not options.paired.is_dir():
        raise ValueError(f"no folder to pair with at {str(options.paired)!r}: give one that txt2img.py wrote")
    other = open_folder(options.paired).framed(pictures.framing)
    return pair_up(pictures, other)


def check_before_drawing(options: ScoringOptions, size: Size) -> None:
    """Raise what `score` would raise for pictures that are not drawn yet, as far as the reference and features tell.

    size: of the pictures to come.
    """
    source, stored = options.reference, None
    if source is not None and is_statistics(source):
        stored = read_statistics(Path(source))
    elif source is not None:
        per_class = options.per_class or PER_CLASS
        reference = open_source(
            source, what="reference", limit=options.reference_n, per_class=per_class, shapes_side=size[0]
        )
        reference = reference.framed(choose_framing(options.resize, options.size, reference))
        if options.resize == "none" and reference.size != size:
            raise ValueError(f"the reference is {size_text(reference.size)}, the pictures will be {size_text(size)}")
    choose_features(options, stored=stored)


# --- features ----------------------------------------------------------------------------------------------


def open_extractor(
    source: str, options: ScoringOptions, reference: PictureSet | Gaussian | None, pictures: PictureSet
) -> Extractor:
    """Return the extractor that the options name, or that the sources suggest. Raises ValueError if it suits neither.

    Pictures of shapes suggest the shapes features, statistics those that they were made of, all else Inception's.
    """
    stored = reference if isinstance(reference, Gaussian) else None
    extractor = choose_features(options, (source,), stored)
    if extractor.name == SHAPES and any(side % STRIDE for side in pictures.size):
        raise ValueError(
            f"the shapes features need sides that are multiples of {STRIDE}, the pictures are "
            f"{size_text(pictures.size)}: use --resize squash --size {SHAPES_SIDE}"
        )
    if stored is not None:
        _check_statistics(stored, extractor, pictures, options.reference)
    return extractor


def choose_features(options: ScoringOptions, sources: Sequence[str] = (), stored: Gaussian | None = None) -> Extractor:
    """Return the extractor for pictures of `sources` against the reference. It can be asked before there are pictures.

    stored: the reference, if it is a statistics file. Raises ValueError for options without effect, and ValueError or
    OSError if the weights cannot be had.
    """
    suggested = SHAPES if SHAPES in (*sources, options.reference) else "inception"
    name = options.features or (stored.facts if stored else {}).get("extractor", suggested)
    if name not in EXTRACTORS:
        raise ValueError(f"the statistics are of features {name!r}: only {' and '.join(EXTRACTORS)} are known")
    for option, of in (("reader", "shapes"), ("inception_weights", "inception")):
        if getattr(options, option) is not None and name != of:
            raise ValueError(f"--{option} has no effect with features of {name}: leave it out")
    return choose_extractor(name, reader=options.reader, inception_weights=options.inception_weights)


def _check_statistics(stored: Gaussian, extractor: Extractor, pictures: PictureSet, path: str | None) -> None:
    """Raise ValueError if the statistics are of another protocol; warn if they do not say of which."""
    if len(stored.mu) != extractor.dimensions:
        raise ValueError(f"{path!r} is of {len(stored.mu)} features, {extractor.name} has {extractor.dimensions}")
    if not stored.facts:
        logger.warning("%s does not say how its features came about: check that it was in the same way", path)
        return
    ours = {**extractor.facts(), "size": list(pictures.size)}
    for name in ("extractor", "weights_sha256", "size"):
        if stored.facts.get(name) != ours[name]:
            raise ValueError(f"{path!r} is of another {name}, {stored.facts.get(name)}, than ours, {ours[name]}")


# --- scores of sets ----------------------------------------------------------------------------------------


def _score_sets(
    scores: Scores,
    options: ScoringOptions,
    store: FeatureStore,
    pictures: PictureSet,
    reference: PictureSet | Gaussian | None,
    pairing: Pairing | None,
) -> None:
    """Add the scores against the reference, if there is one, and write the statistics of `pictures`, if asked for."""
    features = store(pictures)
    if options.save_stats is not None:
        write_statistics(options.save_stats, _described(features, pictures, store.extractor))
        logger.info("statistics in %s", options.save_stats)
    if store.extractor.name == SHAPES and not (len(set(pictures.size)) == 1 and pictures.size[0] % SHAPES_SIDE == 0):
        scores.notes.append(
            f"shapes features: of pictures of {size_text(pictures.size)}, while the reader has learnt from "
            f"{SHAPES_SIDE}x{SHAPES_SIDE}"
        )
    if reference is None:
        return
    known = reference if isinstance(reference, Gaussian) else store(reference)
    add_set_scores(scores, features, known, options.seed)
    if pairing is not None:
        add_fid_difference(scores, features.chosen(pairing.firsts), _partners(store, pairing), known, options.seed)


def _partners(store: FeatureStore, pairing: Pairing) -> Features:
    """Return the features of the second picture of each pair.

    They are extracted in the order of the folder, so that the store keeps a folder that is paired as a whole once.
    """
    order = sorted(pairing.seconds)
    rank = {index: place for place, index in enumerate(order)}
    return store(pairing.second.subset(order)).chosen([rank[index] for index in pairing.seconds])


def _described(features: Features, pictures: PictureSet, extractor: Extractor) -> Gaussian:
    """Return the statistics of `pictures`, with all that a later comparison must know."""
    gaussian = gaussian_of(features)
    facts = {**pictures.facts(), "resize": str(pictures.framing), **extractor.facts()}
    return Gaussian(mu=gaussian.mu, sigma=gaussian.sigma, n=gaussian.n, facts=facts)


def _reference_facts(reference: PictureSet | Gaussian, source: str | None) -> dict[str, Any]:
    if isinstance(reference, PictureSet):
        return reference.facts()
    return {**reference.facts, "source": f"statistics {source}", "n": reference.n}
