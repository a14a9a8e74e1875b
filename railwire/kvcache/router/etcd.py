"""A registry of members in etcd v3, over its HTTP JSON gateway. Each member's key hangs on a lease, so etcd itself
removes the dead."""

from __future__ import annotations

import asyncio
import base64
import binascii
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any

from railwire.kvcache.router.membership import Member, MembershipError, MembershipLost, poll
from railwire.wire import UNREADABLE

_MAX_ANSWER = 64 << 20
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a registry is not behind a web proxy


class EtcdMembership:
    """A :class:`~railwire.kvcache.router.membership.Membership`.

    Args:
        endpoints: such as ``["http://10.0.0.1:2379"]``; tried in turn.
        prefix: of the keys.
        timeout: seconds for each request.
        interval: seconds between two looks of ``watch()``.
    """

    def __init__(
        self, endpoints: Sequence[str], *, prefix: str = "/railwire/kv/", timeout: float = 5.0, interval: float = 0.25
    ) -> None:
        if not endpoints or any(not url.startswith(("http://", "https://")) for url in endpoints):
            raise ValueError(f"etcd endpoints are HTTP URLs, not {list(endpoints)!r}")
        self._endpoints = [url.rstrip("/") for url in endpoints]
        self._prefix = prefix if prefix.endswith("/") else prefix + "/"
        self._timeout = timeout
        self._interval = interval
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
        for entry in answer.get("kvs") or []:
            try:
                member = Member.decode(base64.b64decode(entry["value"], validate=True))
            except (MembershipError, KeyError, TypeError, binascii.Error):
                continue  # somebody else's key
            members[member.id] = member
        return members

    def watch(self) -> AsyncIterator[dict[str, Member]]:
        return poll(self.snapshot, self._interval)

    async def close(self) -> None:
        self._published.clear()

    async def _put(self, member: Member, lease: str) -> None:
        record = member.encode()
        body = {"key": _b64(self._prefix + member.id), "value": base64.b64encode(record).decode(), "lease": lease}
        await self._post("/v3/kv/put", body)
        self._published[member.id] = record

    async def _revoke(self, lease: str) -> None:
        try:
            await self._post("/v3/lease/revoke", {"ID": lease})
        except MembershipLost:
            pass  # it has run out by itself

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return await asyncio.to_thread(self._post_blocking, path, json.dumps(body).encode())

    def _post_blocking(self, path: str, body: bytes) -> dict[str, Any]:
        why = ""
        for _ in range(len(self._endpoints)):
            url = self._endpoints[0] + path
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
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
                raise MembershipError(f"etcd at {url}: {error.code} {text[:200]}") from error
            except (OSError, http.client.HTTPException, *UNREADABLE) as error:  # URLErrors and time-outs are OSErrors
                why = f"etcd at {url}: {error}"
                self._endpoints.append(self._endpoints.pop(0))
        raise MembershipError(why)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
