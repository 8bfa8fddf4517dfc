#!/usr/bin/env bash
# Start a run or go on with it, stop it cleanly on Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, and with --restarts start it anew
# up to N times when it ends early without being told to. RUN_FOLDER becomes the run's --output_dir.
#   bash launch/train.sh [--restarts N] RUN_FOLDER deepspeed --num_gpus 4 launch/train.py --config RECIPE ...
#   bash launch/train.sh [--restarts N] --hostfile HOSTS RUN_FOLDER --config RECIPE ...
set -uo pipefail
restarts=0 hostfile=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --restarts) restarts=${2:-} ;;
    --hostfile) hostfile=${2:-} ;;
    *) restarts= ;;
  esac
  if ! [[ $restarts =~ ^[0-9]+$ ]] || [ $# -lt 2 ]; then
    echo "agsel: error: train.sh: $*: give --restarts NUMBER or --hostfile FILE, then RUN_FOLDER" >&2
    exit 2
  fi
  shift 2
done
if [ $# = 0 ]; then
  echo "agsel: error: train.sh: no run folder: bash launch/train.sh RUN_FOLDER COMMAND..." >&2
  exit 2
fi
run=$1
shift
if [ -z "$hostfile" ] && ! type -P -- "${1:-}" > /dev/null; then
  echo "agsel: error: train.sh: ${1:-nothing} is no command: give RUN_FOLDER, then for example deepspeed launch/train.py ..." >&2
  exit 2
fi
for word in "$@"; do
  if [[ $word == --output[_-]dir* || $word == --resume[_-]from[_-]checkpoint* ]]; then
    echo "agsel: error: train.sh: $word: leave it out: a run goes on in RUN_FOLDER, from its newest checkpoint" >&2
    exit 2
  fi
done
[ -z "$hostfile" ] || set -- python "$(dirname "${BASH_SOURCE[0]}")/hosts.py" "$hostfile" "$run" "$@"

if ! mkdir -p "$run" 2> /dev/null; then
  echo "agsel: error: train.sh: cannot make the run folder $run: choose another" >&2
  exit 2
fi
rm -f "$run/STOP"
# A STOP file reaches the ranks of all hosts in time of their own: a signal to `deepspeed` kills it, or them after 30 s.
trap 'touch "$run/STOP"' INT TERM HUP USR1

restarts=$((10#$restarts))  # 08 is no octal number
for ((left = restarts; ; left--)); do
  rm -f "$run/PREEMPTED"
  # In a session of its own, out of reach of the terminal's Ctrl-C.
  setsid "$@" --output_dir "$run" --resume_from_checkpoint auto &
  while kill -0 $! 2> /dev/null; do wait $!; done
  # Ranks whose launcher was killed are still saving. In containers, the dead may never be taken away.
  while ps -s $! -o stat= 2> /dev/null | grep -qv '^Z'; do sleep 1; done
  wait $!
  status=$?
  [ $status != 0 ] || [ -e "$run/PREEMPTED" ] || exit 0
  if [ -e "$run/STOP" ] || grep -qs '"a STOP file' "$run/PREEMPTED" || [ "$left" -le 0 ]; then exit $status; fi
  if [ $status = 2 ]; then  # refused: at the first start for good, later perhaps because a host is not back yet
    [ "$left" != "$restarts" ] || exit 2
    for ((second = 0; second < 60; second++)); do [ -e "$run/STOP" ] || sleep 1; done
    [ ! -e "$run/STOP" ] || exit 2
  fi
  echo "train.sh  the run ended early (exit code $status): starting it again, $((left - 1)) more times at most"
done
