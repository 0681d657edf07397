#!/usr/bin/env bash
# A Ray cluster on machines of your own, without containers and without a scheduler.
set -euo pipefail

usage() {
    cat >&2 << 'END'
bash launch/onprem.sh up node-1 node-2 node-3      over ssh; the first is the head, and has roles too
bash launch/onprem.sh down node-1 node-2 node-3
bash launch/onprem.sh head                         on this machine
bash launch/onprem.sh worker HEAD
bash launch/onprem.sh end

To change, in the environment: FOLDER, the repository on each machine (a shared folder, or one at the same path; by default
this one), VENV, the Python environment in it, PORT, DASHBOARD_PORT, START_TIMEOUT and GPUS (of each machine; by default what
Ray finds). For "head", "worker" and "end" also STATE, where the machine keeps process id and log. ~/.ray/auth_token, which is
made where there is none and copied to all machines, lets in who has it. "end" ends what was started here, and no other Ray.
END
    exit 2
}

FOLDER=${FOLDER:-$(cd "$(dirname "$0")/.." && pwd)}
VENV=${VENV:-.venv}
PORT=${PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
STATE=${STATE:-/tmp/rayrlhf-$(id -un)}
TOKEN=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
START_TIMEOUT=${START_TIMEOUT:-60}

# Start Ray on this machine; returns once it is up.
start() {
    local ray="$FOLDER/$VENV/bin/ray" gpus=()
    [ -x "$ray" ] || { echo "there is no $ray on $(hostname): set FOLDER and VENV" >&2; exit 1; }
    [ -s "$TOKEN" ] || { echo "there is no $TOKEN on $(hostname): \`onprem.sh up\` makes and copies it" >&2; exit 1; }
    if [ -e "$STATE/pid" ] && kill -0 "$(cat "$STATE/pid")" 2>/dev/null; then
        echo "Ray runs on $(hostname) already; \`onprem.sh end\` ends it" >&2
        exit 1
    fi
    mkdir -p "$STATE"
    if [ -n "${GPUS:-}" ]; then gpus=(--num-gpus="$GPUS"); fi
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$TOKEN" RAY_USAGE_STATS_ENABLED=0 \
        setsid "$ray" start --block "$@" ${gpus[@]+"${gpus[@]}"} < /dev/null > "$STATE/log" 2>&1 &
    echo $! > "$STATE/pid"
    local deadline=$((SECONDS + START_TIMEOUT))
    until grep -q "Ray runtime started" "$STATE/log"; do
        if ! kill -0 "$(cat "$STATE/pid")" 2>/dev/null || [ "$SECONDS" -ge "$deadline" ]; then
            echo "Ray did not start on $(hostname):" >&2
            tail -n 20 "$STATE/log" >&2
            end
            exit 1
        fi
        sleep 1
    done
    echo "Ray is up on $(hostname)"
}

# End the Ray of this machine that `start` started.
end() {
    [ -e "$STATE/pid" ] || return 0
    local pid
    pid=$(cat "$STATE/pid")
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 30); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 1
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
    rm -f "$STATE/pid"
}

# This script with the same settings on another machine.
there() {
    local host=$1
    shift
    # shellcheck disable=SC2029  # the values are meant from here
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" \
        "FOLDER='$FOLDER' VENV='$VENV' PORT='$PORT' DASHBOARD_PORT='$DASHBOARD_PORT' START_TIMEOUT='$START_TIMEOUT' \
         GPUS='${GPUS:-}' bash -s -- $*" \
        < "$FOLDER/launch/onprem.sh"
}

up() {
    local head=$1 host
    if [ ! -s "$TOKEN" ]; then "$FOLDER/$VENV/bin/ray" get-auth-token --generate > /dev/null; fi
    for host in "$@"; do
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" \
            'umask 077 && mkdir -p ~/.ray && cat > ~/.ray/auth_token' < "$TOKEN"
    done
    there "$head" head
    shift
    for host in "$@"; do there "$host" worker "$head"; done
    echo "the dashboard: http://$head:$DASHBOARD_PORT"
}

command=${1:-}
[ $# -eq 0 ] || shift
case "$command" in
    head) start --head --port="$PORT" --dashboard-host=0.0.0.0 --dashboard-port="$DASHBOARD_PORT" ;;
    worker) [ $# -eq 1 ] || usage; start --address="$1:$PORT" ;;
    end) end ;;
    up) [ $# -ge 1 ] || usage; up "$@" ;;
    down) [ $# -ge 1 ] || usage; for host in "$@"; do there "$host" end; done ;;
    *) usage ;;
esac
