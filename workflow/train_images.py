"""One run on images by several processes: torchrun --nproc_per_node 2 workflow/train_images.py -p target v

The parameters are those of nbs/train_images.ipynb, which shows the run afterwards.
"""
import argparse
import ast

from lfdm.images.parameters import ImageParameters
from lfdm.parameters import parameters_from
from lfdm.runs import make_run, progress_bar


def value(text):
    "What a word stands for: a number, True, None, or itself."
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): return text


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="a parameter of nbs/train_images.ipynb")
    parser.add_argument("--study", default="train_images", help="the folder of runs/ for the record")
    given = parser.parse_args()
    parameters = parameters_from({name: value(text) for name, text in given.p}, ImageParameters)
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SystemExit("several processes need accelerate: pip install 'lfdm[accelerate]'") from None
    # the precision is a parameter of the run, whatever `accelerate config` was once told
    accelerator = Accelerator(cpu=parameters.device == "cpu", mixed_precision="no")
    progress = progress_bar() if accelerator.is_main_process else None
    run = make_run(parameters, given.study, progress=progress, accelerator=accelerator)
    if run: print(run)


if __name__ == "__main__": main()
