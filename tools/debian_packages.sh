#!/usr/bin/env bash
# Install the Debian packages that are not there: bash tools/debian_packages.sh PACKAGE...
set -euo pipefail
missing=()
for package; do
  dpkg-query --show --showformat '${db:Status-Status}' "$package" 2> /dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
echo "installing ${missing[*]}; to remove them: apt-get purge ${missing[*]}"
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
policy=/usr/sbin/policy-rc.d
failed() {
  echo "cannot install ${missing[*]}: needs Debian or the like, root or sudo without a password, and its packages" >&2
  exit 1
}
if [ ! -e $policy ]; then  # it keeps sshd and Slurm of the packages from starting: tests start their own
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" install -m 755 /dev/stdin $policy || failed
  trap '"${as_root[@]}" rm -f $policy' EXIT
fi
apt=(env DEBIAN_FRONTEND=noninteractive timeout 900 apt-get -o DPkg::Lock::Timeout=300 -o Acquire::http::Timeout=20)
"${as_root[@]}" "${apt[@]}" update -qq || failed
"${as_root[@]}" "${apt[@]}" install -y -qq --no-install-recommends "${missing[@]}" > /dev/null || failed
