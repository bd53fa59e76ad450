#!/usr/bin/env bash
# For maintainers: makes and pushes the tag of a release, which starts .github/workflows/release.yml.
#
#   bash .github/release.sh 0.2.0
#
# Sets the version (minimind_mcore/__init__.py, the only place) and names the section Unreleased of CHANGELOG.md.
# REMOTE: where to push (default: origin)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 1
}
VERSION=${1:-}
[[ $VERSION =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || fail "VERSION '$VERSION': expected three numbers, such as 0.2.0"
[ "$(git branch --show-current)" = main ] || fail "the branch is '$(git branch --show-current)': expected main"
[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed: commit or remove them"
! git rev-parse -q --verify "refs/tags/v$VERSION" > /dev/null || fail "the tag v$VERSION exists: choose another version"
grep -q '^## Unreleased$' CHANGELOG.md || fail "CHANGELOG.md has no section '## Unreleased': nothing to release"

sed -i "s/^__version__ = .*/__version__ = \"$VERSION\"/" minimind_mcore/__init__.py
sed -i "s/^## Unreleased$/## Unreleased\n\n## $VERSION ($(date +%F))/" CHANGELOG.md
git commit --quiet --all --message "Release $VERSION"
git tag --annotate "v$VERSION" --message "Release $VERSION"
git push --quiet --atomic "${REMOTE:-origin}" main "v$VERSION"
echo "pushed v$VERSION"
