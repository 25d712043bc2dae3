"""Read all images of a data set before a long run, and report what is wrong with it.

python scripts/verify_data.py dataset=imagenet
python scripts/verify_data.py dataset=imagefolder dataset.root=photos num_workers=16 output=report.json

Found are images that can't be read, copies (of the pixels), and images that are in both the training and the validation
part; the report has the number of images of each class, too. The keys are those of train.py and output=<JSON file>. The
exit code is 1 if there is a problem.
"""

from bcos_train.commands import verify_data

if __name__ == "__main__":
    verify_data()
