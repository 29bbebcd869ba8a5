"""Run a benchmark of UNet calls, whole pictures, kernels or starts, here or under caps; tell and write its tables."""

from pathlib import Path

from tqdm import tqdm

from dsdiff.benchmark.options import BenchmarkOptions


def execute(options: BenchmarkOptions) -> None:
    """Measure what the options ask for, tell its tables, and write its files to OUTDIR."""
    if options.isa is not None:
        from dsdiff.benchmark import isa

        tqdm.write(isa.benchmark(options))
    else:
        tqdm.write(measure(options, options.outdir))


def measure(options: BenchmarkOptions, outdir: Path) -> str:
    """Measure in this process, whatever caps it; return the tables as text, and write the files to `outdir`."""
    if options.kernels:
        from dsdiff.benchmark import kernels

        timed = kernels.benchmark(options)
        kernels.write(timed, outdir)
        return kernels.text(timed)
    if options.startup:
        from dsdiff.benchmark import startup

        started = startup.startup(options)
        startup.write(started, outdir)
        return startup.text(started)
    if options.pictures:
        from dsdiff.benchmark.pictures import report as pictures_report
        from dsdiff.benchmark.pictures import run as pictures

        drawn = pictures.benchmark(options)
        pictures_report.write(drawn, outdir)
        return pictures_report.text(drawn)
    from dsdiff.benchmark import report, run

    measured = run.benchmark(options)
    report.write(measured, outdir)
    return report.text(measured)
