"""The official weight files of the judges, and files that are mistaken for them. Data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightFile:
    """An official file. sha256 may be a prefix; git_blob: what `git hash-object` prints; "": unpublished."""

    file: str
    network: str
    source: str
    sha256: str = ""
    git_blob: str = ""

    @property
    def digest(self) -> str:
        if self.git_blob:
            return f"git hash-object {self.git_blob}"
        return f"sha256 {self.sha256}" if self.sha256 else "no digest published"


WEIGHT_FILES = {
    "i3d": WeightFile(
        "i3d_pretrained_400.pt",
        "I3D",
        "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt",
        git_blob="a867b87ac3a9097d200598b1d48a1b890d8ec744",
    ),
    "i3d_torchscript": WeightFile(
        "i3d_torchscript.pt",
        "I3D",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        sha256="bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    "c3d": WeightFile(
        "conv3d_deepnetA_ucf.npz",
        "C3D",
        "https://github.com/rezoo/tgan2/releases/download/v1.0/conv3d_deepnetA_ucf.npz",
    ),
    "c3d_mean": WeightFile(
        "mean2.npz", "C3D", "https://github.com/rezoo/tgan2/releases/download/v1.0/mean2.npz"
    ),
    "alexnet": WeightFile(
        "alexnet-owt-7be5be79.pth",
        "LPIPS",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        sha256="7be5be79",
    ),
}
# Files that load and give another number: refused by digest (git's) and by name.
WRONG_NAMES = {
    "rgb_imagenet": "rgb_imagenet.pt of pytorch-i3d: trained on ImageNet and Kinetics, it loads and gives an FVD "
    "that compares with nothing",
}
WRONG_FILES = {"73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a": WRONG_NAMES["rgb_imagenet"]}
