#!/usr/bin/env bash
# Prune on two "hosts": network namespaces of this machine with a link between them, two ranks each.
#   tools/two_hosts.sh MODEL OUT [options of grasp prune]
# Needs root and iproute2. Prints the bytes that crossed the link and the seconds; --shard and the
# others are options of `grasp prune`. The first host's address is 10.77.0.1.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
model=$1 out=$2; shift 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1

hosts() { for host in 1 2; do ip netns "$1" "grasp$host" 2>/dev/null || true; done; }
trap 'hosts delete' EXIT
hosts add
ip link add link1 netns grasp1 type veth peer name link2 netns grasp2
for host in 1 2; do
  ip -n "grasp$host" address add "10.77.0.$host/24" dev "link$host"
  ip -n "grasp$host" link set "link$host" up
  ip -n "grasp$host" link set lo up
done

on() {
  host=$1; shift
  ip netns exec "grasp$host" env GLOO_SOCKET_IFNAME="link$host" \
    "$python" -m torch.distributed.run --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d \
    --rdzv-endpoint 10.77.0.1:29500 --rdzv-conf "is_host=$((host == 1))" \
    --local-addr "10.77.0.$host" -m grasp prune "$model" --out "$out" "$@"
}
received() { ip netns exec "grasp$1" cat "/sys/class/net/link$1/statistics/rx_bytes"; }

on 2 "$@" >/dev/null & other=$!
on 1 "$@"
wait "$other"
echo "received over the link: $(received 1) and $(received 2) bytes, in $SECONDS seconds"
