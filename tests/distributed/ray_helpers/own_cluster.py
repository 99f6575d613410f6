"""Stands for a user's own Ray cluster: says its address, its nodes' pids and its metrics' URL; ends with its input.

python own_cluster.py CPUS [CPUS ...]       one node each, the first of them the head
"""

import json
import sys

from ray.cluster_utils import Cluster


def begin(cpus: int, tries: int = 4) -> Cluster:
    """Start the head; again where a busy machine was slower than Ray waits."""
    try:
        settings = {"num_cpus": cpus, "include_dashboard": False}
        return Cluster(
            initialize_head=True,
            head_node_args=settings | {"_system_config": {"metrics_report_interval_ms": 1000}},
        )
    except Exception:
        if tries == 1:
            raise
        return begin(cpus, tries - 1)


def main() -> None:
    cluster = begin(int(sys.argv[1]))
    nodes = [cluster.head_node, *(cluster.add_node(num_cpus=int(each)) for each in sys.argv[2:])]
    pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
    metrics = f"http://127.0.0.1:{cluster.head_node.metrics_export_port}/metrics"
    print(json.dumps({"address": cluster.address, "raylets": pids, "metrics": metrics}), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
