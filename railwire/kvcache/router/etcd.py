"""A registry of members in etcd v3, over its HTTP JSON gateway. Each member's key hangs on a lease, so etcd itself
removes the dead."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any

from railwire.kvcache.router.membership import Member, MembershipError, MembershipLost, poll
from railwire.kvcache.router.seal import Seal
from railwire.wire import UNREADABLE

_MAX_ANSWER = 64 << 20


class _TokenRefused(MembershipError):
    """Sign in again."""


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a registry is not behind a web proxy


class EtcdMembership:
    """A :class:`~railwire.kvcache.router.membership.Membership`.

    Args:
        endpoints: such as ``["http://10.0.0.1:2379"]``, or https; tried in turn.
        user, password: of etcd's own authentication; no user: none is used.
        secret: shared by all members and routers; records that are not signed with it do not count. None: all do.
        prefix: of the keys.
        timeout: seconds for each request.
        interval: seconds between two looks of ``watch()``.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        user: str = "",
        password: str = "",
        secret: str | None = None,
        prefix: str = "/railwire/kv/",
        timeout: float = 5.0,
        interval: float = 0.25,
    ) -> None:
        if not endpoints or any(not url.startswith(("http://", "https://")) for url in endpoints):
            raise ValueError(f"etcd endpoints are HTTP URLs, not {list(endpoints)!r}")
        self._endpoints = [url.rstrip("/") for url in endpoints]
        self._prefix = prefix if prefix.endswith("/") else prefix + "/"
        self._timeout = timeout
        self._interval = interval
        self._user, self._password = user, password
        self._token = ""
        self._seal = Seal(secret)
        self._leases: dict[str, str] = {}
        self._published: dict[str, bytes] = {}

    async def join(self, member: Member, ttl: float) -> None:
        # etcd counts whole seconds, and gives a lease at least its election time-out.
        answer = await self._post("/v3/lease/grant", {"TTL": str(max(1, round(ttl)))})
        lease = answer.get("ID")
        if not isinstance(lease, str):
            raise MembershipError(f"etcd gave no lease for member {member.id}: {str(answer)[:200]}")
        old = self._leases.get(member.id)
        await self._put(member, lease)
        self._leases[member.id] = lease
        if old is not None:
            await self._revoke(old)

    async def renew(self, member: Member) -> None:
        lease = self._leases.get(member.id)
        if lease is None:
            raise MembershipLost(f"member {member.id} has not joined through this registry client")
        answer = await self._post("/v3/lease/keepalive", {"ID": lease})
        result = answer.get("result")
        if not isinstance(result, dict) or str(result.get("TTL") or "0") == "0":
            self._leases.pop(member.id, None)
            raise MembershipLost(f"the lease of member {member.id} has run out: join() again")
        if self._published.get(member.id) != member.encode():
            await self._put(member, lease)

    async def leave(self, member_id: str) -> None:
        self._published.pop(member_id, None)
        lease = self._leases.pop(member_id, None)
        if lease is not None:
            await self._revoke(lease)

    async def snapshot(self) -> dict[str, Member]:
        end = self._prefix[:-1] + chr(ord(self._prefix[-1]) + 1)
        answer = await self._post("/v3/kv/range", {"key": _b64(self._prefix), "range_end": _b64(end)})
        members: dict[str, Member] = {}
        ignored = 0
        for entry in answer.get("kvs") or []:
            try:
                key = base64.b64decode(entry["key"], validate=True).decode()
                member = Member.decode(self._seal.open(base64.b64decode(entry["value"], validate=True), key))
            except (MembershipError, KeyError, TypeError, *UNREADABLE):  # of base64, too
                ignored += 1  # somebody else's key
                continue
            members[member.id] = member
        self._seal.ignored(ignored, self._endpoints[0])
        return members

    def watch(self) -> AsyncIterator[dict[str, Member]]:
        return poll(self.snapshot, self._interval)

    async def close(self) -> None:
        self._published.clear()

    async def _put(self, member: Member, lease: str) -> None:
        record = member.encode()
        key = self._prefix + member.id
        value = base64.b64encode(self._seal.close(record, key)).decode()
        await self._post("/v3/kv/put", {"key": _b64(key), "value": value, "lease": lease})
        self._published[member.id] = record

    async def _revoke(self, lease: str) -> None:
        try:
            await self._post("/v3/lease/revoke", {"ID": lease})
        except MembershipLost:
            pass  # it has run out by itself

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._post_as_user, path, body)

    def _post_as_user(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if not self._user:
            return self._post_blocking(path, body, "")
        token = self._token or self._authenticate()
        try:
            return self._post_blocking(path, body, token)
        except _TokenRefused:  # they last for some minutes, and not beyond a restart
            return self._post_blocking(path, body, self._authenticate())

    def _authenticate(self) -> str:
        answer = self._post_blocking("/v3/auth/authenticate", {"name": self._user, "password": self._password}, "")
        token = answer.get("token")
        if not isinstance(token, str) or not token:
            raise MembershipError(f"etcd gave no token for user {self._user}")
        self._token = token
        return token

    def _post_blocking(self, path: str, body: dict[str, Any], token: str) -> dict[str, Any]:
        why = ""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": token} if token else {})}
        for _ in range(len(self._endpoints)):
            url = self._endpoints[0] + path
            request = urllib.request.Request(url, data, headers)
            try:
                with _direct.open(request, timeout=self._timeout) as response:
                    answer = json.loads(response.read(_MAX_ANSWER))
                if not isinstance(answer, dict):
                    raise MembershipError(f"etcd at {url} answers no JSON object")
                return answer
            except urllib.error.HTTPError as error:
                text = error.read(1000).decode(errors="replace")
                if "lease not found" in text:
                    raise MembershipLost(f"etcd: {text[:200]}") from error
                kind = _TokenRefused if token and "auth token" in text else MembershipError
                raise kind(f"etcd at {url}: {error.code} {text[:200]}") from error
            except (OSError, http.client.HTTPException, *UNREADABLE) as error:  # URLErrors and time-outs are OSErrors
                why = f"etcd at {url}: {error}"
                self._endpoints.append(self._endpoints.pop(0))
        raise MembershipError(why)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
