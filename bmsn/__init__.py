"""bmsn: where should a CNN downsample? A balanced mixture of supernets ranks all pooling architectures.

>>> import bmsn
>>> space = bmsn.SearchSpace.named("resnet14-cifar10")
>>> nets = bmsn.SupernetMixture(space, num_supernets=4, num_classes=10)
>>> scores = bmsn.score_architectures(nets, images, labels)
>>> result = bmsn.run_search(bmsn.SearchConfig(space=space.name, data="npz:images.npz", epochs=2, batch_size=16))
>>> net = bmsn.build_network(space, result.best.architecture, num_classes=10)
"""

from bmsn import methods
from bmsn.backend import backend_report
from bmsn.comparison import Comparison, ComparisonConfig, run_comparison
from bmsn.config import SearchConfig
from bmsn.data import ImageDataset, open_dataset
from bmsn.errors import InputError, RunStopped
from bmsn.evaluator import Scores, score_architectures, score_one_by_one
from bmsn.exporting import Export, ExportConfig, run_export
from bmsn.exporting_files import load_network
from bmsn.exporting_network import network_from_supernet
from bmsn.latency import Latency, measure_latency
from bmsn.mixture import BalancedMixture
from bmsn.network import SupernetMixture, build_network, build_path_network
from bmsn.ops.balance import balance
from bmsn.paths import ResolutionPath
from bmsn.plan import EvaluationPlan
from bmsn.racing import Race, race
from bmsn.result import SearchResult
from bmsn.retraining import RetrainConfig, run_retraining
from bmsn.run import Interrupted, run_search
from bmsn.scheduler import Resources
from bmsn.space import Architecture, SearchSpace
from bmsn.standalone import TrainingSettings
from bmsn.truth import GroundTruthConfig, run_ground_truth

__all__ = [
    "Architecture",
    "BalancedMixture",
    "Comparison",
    "ComparisonConfig",
    "EvaluationPlan",
    "Export",
    "ExportConfig",
    "GroundTruthConfig",
    "ImageDataset",
    "InputError",
    "Interrupted",
    "Latency",
    "Race",
    "ResolutionPath",
    "Resources",
    "RetrainConfig",
    "RunStopped",
    "Scores",
    "SearchConfig",
    "SearchResult",
    "SearchSpace",
    "SupernetMixture",
    "TrainingSettings",
    "backend_report",
    "balance",
    "build_network",
    "build_path_network",
    "load_network",
    "measure_latency",
    "methods",
    "network_from_supernet",
    "open_dataset",
    "race",
    "run_comparison",
    "run_export",
    "run_ground_truth",
    "run_retraining",
    "run_search",
    "score_architectures",
    "score_one_by_one",
]
