// Made by scripts/build-kernels.sh of copy.cu; do not edit.
#pragma once

// clang-format off
inline constexpr char kCopyPtx[] = R"ptx(
.version 7.8
.target sm_80
.address_size 64
	// .globl	railwire_copy
.visible .entry railwire_copy(
	.param .u64 railwire_copy_param_0,
	.param .u32 railwire_copy_param_1,
	.param .u64 railwire_copy_param_2,
	.param .u64 railwire_copy_param_3,
	.param .u64 railwire_copy_param_4
)
.maxntid 512, 1, 1
{
	.reg .pred 	%p<61>;
	.reg .b16 	%rs<3>;
	.reg .b32 	%r<1928>;
	.reg .b64 	%rd<419>;
	ld.param.u64 	%rd114, [railwire_copy_param_0];
	ld.param.u32 	%r8, [railwire_copy_param_1];
	mov.u32 	%r1, %nctaid.x;
	mov.u32 	%r2, %tid.x;
	shr.u32 	%r9, %r2, 5;
	mov.u32 	%r10, %ctaid.x;
	mad.lo.s32 	%r1927, %r9, %r1, %r10;
	setp.ge.u32 	%p1, %r1927, %r8;
	@%p1 bra 	$L__BB0_70;
	cvta.to.global.u64 	%rd118, %rd114;
	mul.wide.u32 	%rd119, %r1927, 24;
	add.s64 	%rd120, %rd118, %rd119;
	ld.global.u64 	%rd393, [%rd120];
	ld.global.u64 	%rd392, [%rd120+8];
	ld.global.u64 	%rd391, [%rd120+16];
	and.b32  	%r11, %r2, 31;
	cvt.u64.u32 	%rd4, %r11;
	mov.u64 	%rd121, -97;
	sub.s64 	%rd5, %rd121, %rd4;
	or.b64  	%rd6, %rd4, 128;
$L__BB0_2:
	mov.u32 	%r1926, %ntid.x;
	mov.u32 	%r1925, %nctaid.x;
	shr.u32 	%r1924, %r1926, 5;
	mul.lo.s32 	%r1923, %r1924, %r1925;
	ld.param.u32 	%r1922, [railwire_copy_param_1];
	add.s32 	%r6, %r1927, %r1923;
	setp.lt.u32 	%p2, %r6, %r1922;
	selp.b32 	%r14, %r6, %r1927, %p2;
	mul.wide.u32 	%rd123, %r14, 24;
	add.s64 	%rd124, %rd118, %rd123;
	ld.global.u64 	%rd10, [%rd124];
	ld.global.u64 	%rd11, [%rd124+8];
	ld.global.u64 	%rd12, [%rd124+16];
	neg.s64 	%rd125, %rd392;
	and.b64  	%rd13, %rd125, 15;
	min.u64 	%rd14, %rd13, %rd391;
	setp.le.u64 	%p3, %rd14, %rd4;
	@%p3 bra 	$L__BB0_4;
	add.s64 	%rd126, %rd393, %rd4;
	ld.u8 	%rs1, [%rd126];
	add.s64 	%rd127, %rd392, %rd4;
	st.u8 	[%rd127], %rs1;
$L__BB0_4:
	neg.s64 	%rd377, %rd392;
	and.b64  	%rd376, %rd377, 15;
	min.u64 	%rd375, %rd376, %rd391;
	add.s64 	%rd128, %rd393, %rd375;
	add.s64 	%rd15, %rd392, %rd375;
	sub.s64 	%rd16, %rd391, %rd375;
	shr.u64 	%rd17, %rd16, 4;
	cvt.u32.u64 	%r15, %rd128;
	and.b32  	%r16, %r15, 15;
	and.b64  	%rd18, %rd128, 15;
	sub.s64 	%rd129, %rd375, %rd18;
	add.s64 	%rd19, %rd393, %rd129;
	shl.b32 	%r17, %r15, 3;
	and.b32  	%r7, %r17, 24;
	setp.eq.s32 	%p4, %r16, 0;
	@%p4 bra 	$L__BB0_57;
	cvt.u32.u64 	%r18, %rd18;
	setp.lt.u32 	%p5, %r18, 4;
	shl.b64 	%rd130, %rd4, 4;
	add.s64 	%rd20, %rd15, %rd130;
	@%p5 bra 	$L__BB0_45;
	bra.uni 	$L__BB0_6;
$L__BB0_45:
	or.b64  	%rd288, %rd4, 96;
	setp.ge.u64 	%p38, %rd288, %rd17;
	mov.u64 	%rd412, %rd4;
	@%p38 bra 	$L__BB0_50;
	add.s64 	%rd86, %rd5, %rd17;
	and.b64  	%rd289, %rd86, 128;
	setp.ne.s64 	%p39, %rd289, 0;
	mov.u64 	%rd411, %rd4;
	@%p39 bra 	$L__BB0_48;
	add.s64 	%rd290, %rd19, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1389,%r1390,%r1391,%r1392}, [%rd290];
	// end inline asm
	add.s64 	%rd291, %rd290, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1393,%r1394,%r1395,%r1396}, [%rd291];
	// end inline asm
	add.s64 	%rd292, %rd290, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1397,%r1398,%r1399,%r1400}, [%rd292];
	// end inline asm
	add.s64 	%rd293, %rd290, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1401,%r1402,%r1403,%r1404}, [%rd293];
	// end inline asm
	add.s64 	%rd294, %rd290, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1405,%r1406,%r1407,%r1408}, [%rd294];
	// end inline asm
	add.s64 	%rd295, %rd290, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1409,%r1410,%r1411,%r1412}, [%rd295];
	// end inline asm
	add.s64 	%rd296, %rd290, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1413,%r1414,%r1415,%r1416}, [%rd296];
	// end inline asm
	add.s64 	%rd297, %rd290, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1417,%r1418,%r1419,%r1420}, [%rd297];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1421, %r1389, %r1390, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1425, %r1390, %r1391, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1429, %r1391, %r1392, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1433, %r1392, %r1405, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1437, %r1393, %r1394, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1441, %r1394, %r1395, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1445, %r1395, %r1396, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1449, %r1396, %r1409, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1453, %r1397, %r1398, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1457, %r1398, %r1399, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1461, %r1399, %r1400, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1465, %r1400, %r1413, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1469, %r1401, %r1402, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1473, %r1402, %r1403, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1477, %r1403, %r1404, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1481, %r1404, %r1417, %r7;
	// end inline asm
	st.v4.u32 	[%rd20], {%r1421, %r1425, %r1429, %r1433};
	st.v4.u32 	[%rd20+512], {%r1437, %r1441, %r1445, %r1449};
	st.v4.u32 	[%rd20+1024], {%r1453, %r1457, %r1461, %r1465};
	st.v4.u32 	[%rd20+1536], {%r1469, %r1473, %r1477, %r1481};
	mov.u64 	%rd411, %rd6;
$L__BB0_48:
	and.b64  	%rd299, %rd86, -128;
	setp.eq.s64 	%p40, %rd299, 0;
	mov.u64 	%rd412, %rd6;
	@%p40 bra 	$L__BB0_50;
$L__BB0_49:
	shl.b64 	%rd316, %rd411, 4;
	add.s64 	%rd300, %rd19, %rd316;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1485,%r1486,%r1487,%r1488}, [%rd300];
	// end inline asm
	add.s64 	%rd301, %rd300, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1489,%r1490,%r1491,%r1492}, [%rd301];
	// end inline asm
	add.s64 	%rd302, %rd300, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1493,%r1494,%r1495,%r1496}, [%rd302];
	// end inline asm
	add.s64 	%rd303, %rd300, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1497,%r1498,%r1499,%r1500}, [%rd303];
	// end inline asm
	add.s64 	%rd304, %rd300, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1501,%r1502,%r1503,%r1504}, [%rd304];
	// end inline asm
	add.s64 	%rd305, %rd300, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1505,%r1506,%r1507,%r1508}, [%rd305];
	// end inline asm
	add.s64 	%rd306, %rd300, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1509,%r1510,%r1511,%r1512}, [%rd306];
	// end inline asm
	add.s64 	%rd307, %rd300, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1513,%r1514,%r1515,%r1516}, [%rd307];
	// end inline asm
	add.s64 	%rd317, %rd15, %rd316;
	// begin inline asm
	shf.r.wrap.b32 %r1517, %r1485, %r1486, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1521, %r1486, %r1487, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1525, %r1487, %r1488, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1529, %r1488, %r1501, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1533, %r1489, %r1490, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1537, %r1490, %r1491, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1541, %r1491, %r1492, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1545, %r1492, %r1505, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1549, %r1493, %r1494, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1553, %r1494, %r1495, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1557, %r1495, %r1496, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1561, %r1496, %r1509, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1565, %r1497, %r1498, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1569, %r1498, %r1499, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1573, %r1499, %r1500, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1577, %r1500, %r1513, %r7;
	// end inline asm
	st.v4.u32 	[%rd317], {%r1517, %r1521, %r1525, %r1529};
	st.v4.u32 	[%rd317+512], {%r1533, %r1537, %r1541, %r1545};
	st.v4.u32 	[%rd317+1024], {%r1549, %r1553, %r1557, %r1561};
	st.v4.u32 	[%rd317+1536], {%r1565, %r1569, %r1573, %r1577};
	add.s64 	%rd308, %rd300, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1581,%r1582,%r1583,%r1584}, [%rd308];
	// end inline asm
	add.s64 	%rd309, %rd300, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1585,%r1586,%r1587,%r1588}, [%rd309];
	// end inline asm
	add.s64 	%rd310, %rd300, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1589,%r1590,%r1591,%r1592}, [%rd310];
	// end inline asm
	add.s64 	%rd311, %rd300, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1593,%r1594,%r1595,%r1596}, [%rd311];
	// end inline asm
	add.s64 	%rd312, %rd300, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1597,%r1598,%r1599,%r1600}, [%rd312];
	// end inline asm
	add.s64 	%rd313, %rd300, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1601,%r1602,%r1603,%r1604}, [%rd313];
	// end inline asm
	add.s64 	%rd314, %rd300, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1605,%r1606,%r1607,%r1608}, [%rd314];
	// end inline asm
	add.s64 	%rd315, %rd300, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1609,%r1610,%r1611,%r1612}, [%rd315];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1613, %r1581, %r1582, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1617, %r1582, %r1583, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1621, %r1583, %r1584, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1625, %r1584, %r1597, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1629, %r1585, %r1586, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1633, %r1586, %r1587, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1637, %r1587, %r1588, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1641, %r1588, %r1601, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1645, %r1589, %r1590, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1649, %r1590, %r1591, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1653, %r1591, %r1592, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1657, %r1592, %r1605, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1661, %r1593, %r1594, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1665, %r1594, %r1595, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1669, %r1595, %r1596, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1673, %r1596, %r1609, %r7;
	// end inline asm
	st.v4.u32 	[%rd317+2048], {%r1613, %r1617, %r1621, %r1625};
	st.v4.u32 	[%rd317+2560], {%r1629, %r1633, %r1637, %r1641};
	st.v4.u32 	[%rd317+3072], {%r1645, %r1649, %r1653, %r1657};
	st.v4.u32 	[%rd317+3584], {%r1661, %r1665, %r1669, %r1673};
	add.s64 	%rd412, %rd411, 256;
	add.s64 	%rd318, %rd411, 352;
	setp.lt.u64 	%p41, %rd318, %rd17;
	mov.u64 	%rd411, %rd412;
	@%p41 bra 	$L__BB0_49;
$L__BB0_50:
	setp.ge.u64 	%p42, %rd412, %rd17;
	@%p42 bra 	$L__BB0_67;
	not.b64 	%rd319, %rd412;
	add.s64 	%rd91, %rd17, %rd319;
	shr.u64 	%rd320, %rd91, 5;
	add.s64 	%rd321, %rd320, 1;
	and.b64  	%rd92, %rd321, 3;
	setp.eq.s64 	%p43, %rd92, 0;
	mov.u64 	%rd413, %rd412;
	@%p43 bra 	$L__BB0_55;
	shl.b64 	%rd324, %rd412, 4;
	add.s64 	%rd322, %rd19, %rd324;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1677,%r1678,%r1679,%r1680}, [%rd322];
	// end inline asm
	add.s64 	%rd323, %rd322, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1681,%r1682,%r1683,%r1684}, [%rd323];
	// end inline asm
	add.s64 	%rd94, %rd15, %rd324;
	// begin inline asm
	shf.r.wrap.b32 %r1685, %r1677, %r1678, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1689, %r1678, %r1679, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1693, %r1679, %r1680, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1697, %r1680, %r1681, %r7;
	// end inline asm
	st.v4.u32 	[%rd94], {%r1685, %r1689, %r1693, %r1697};
	add.s64 	%rd413, %rd412, 32;
	setp.eq.s64 	%p44, %rd92, 1;
	@%p44 bra 	$L__BB0_55;
	add.s64 	%rd325, %rd322, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1701,%r1702,%r1703,%r1704}, [%rd325];
	// end inline asm
	add.s64 	%rd326, %rd322, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1705,%r1706,%r1707,%r1708}, [%rd326];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1709, %r1701, %r1702, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1713, %r1702, %r1703, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1717, %r1703, %r1704, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1721, %r1704, %r1705, %r7;
	// end inline asm
	st.v4.u32 	[%rd94+512], {%r1709, %r1713, %r1717, %r1721};
	add.s64 	%rd413, %rd412, 64;
	setp.eq.s64 	%p45, %rd92, 2;
	@%p45 bra 	$L__BB0_55;
	add.s64 	%rd327, %rd322, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1725,%r1726,%r1727,%r1728}, [%rd327];
	// end inline asm
	add.s64 	%rd328, %rd322, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1729,%r1730,%r1731,%r1732}, [%rd328];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1733, %r1725, %r1726, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1737, %r1726, %r1727, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1741, %r1727, %r1728, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1745, %r1728, %r1729, %r7;
	// end inline asm
	st.v4.u32 	[%rd94+1024], {%r1733, %r1737, %r1741, %r1745};
	add.s64 	%rd413, %rd412, 96;
$L__BB0_55:
	setp.lt.u64 	%p46, %rd91, 96;
	@%p46 bra 	$L__BB0_67;
$L__BB0_56:
	shl.b64 	%rd337, %rd413, 4;
	add.s64 	%rd329, %rd19, %rd337;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1749,%r1750,%r1751,%r1752}, [%rd329];
	// end inline asm
	add.s64 	%rd330, %rd329, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1753,%r1754,%r1755,%r1756}, [%rd330];
	// end inline asm
	add.s64 	%rd338, %rd15, %rd337;
	// begin inline asm
	shf.r.wrap.b32 %r1757, %r1749, %r1750, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1761, %r1750, %r1751, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1765, %r1751, %r1752, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1769, %r1752, %r1753, %r7;
	// end inline asm
	st.v4.u32 	[%rd338], {%r1757, %r1761, %r1765, %r1769};
	add.s64 	%rd331, %rd329, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1773,%r1774,%r1775,%r1776}, [%rd331];
	// end inline asm
	add.s64 	%rd332, %rd329, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1777,%r1778,%r1779,%r1780}, [%rd332];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1781, %r1773, %r1774, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1785, %r1774, %r1775, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1789, %r1775, %r1776, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1793, %r1776, %r1777, %r7;
	// end inline asm
	st.v4.u32 	[%rd338+512], {%r1781, %r1785, %r1789, %r1793};
	add.s64 	%rd333, %rd329, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1797,%r1798,%r1799,%r1800}, [%rd333];
	// end inline asm
	add.s64 	%rd334, %rd329, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1801,%r1802,%r1803,%r1804}, [%rd334];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1805, %r1797, %r1798, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1809, %r1798, %r1799, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1813, %r1799, %r1800, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1817, %r1800, %r1801, %r7;
	// end inline asm
	st.v4.u32 	[%rd338+1024], {%r1805, %r1809, %r1813, %r1817};
	add.s64 	%rd335, %rd329, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1821,%r1822,%r1823,%r1824}, [%rd335];
	// end inline asm
	add.s64 	%rd336, %rd329, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1825,%r1826,%r1827,%r1828}, [%rd336];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1829, %r1821, %r1822, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1833, %r1822, %r1823, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1837, %r1823, %r1824, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1841, %r1824, %r1825, %r7;
	// end inline asm
	st.v4.u32 	[%rd338+1536], {%r1829, %r1833, %r1837, %r1841};
	add.s64 	%rd413, %rd413, 128;
	setp.lt.u64 	%p47, %rd413, %rd17;
	@%p47 bra 	$L__BB0_56;
	bra.uni 	$L__BB0_67;
$L__BB0_57:
	or.b64  	%rd339, %rd4, 224;
	setp.ge.u64 	%p48, %rd339, %rd17;
	mov.u64 	%rd416, %rd4;
	@%p48 bra 	$L__BB0_60;
	mov.u64 	%rd415, %rd4;
$L__BB0_59:
	shl.b64 	%rd348, %rd415, 4;
	add.s64 	%rd340, %rd19, %rd348;
	add.s64 	%rd341, %rd340, 512;
	add.s64 	%rd342, %rd340, 1024;
	add.s64 	%rd343, %rd340, 1536;
	add.s64 	%rd344, %rd340, 2048;
	add.s64 	%rd345, %rd340, 2560;
	add.s64 	%rd346, %rd340, 3072;
	add.s64 	%rd347, %rd340, 3584;
	add.s64 	%rd349, %rd15, %rd348;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1845,%r1846,%r1847,%r1848}, [%rd340];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1849,%r1850,%r1851,%r1852}, [%rd341];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1853,%r1854,%r1855,%r1856}, [%rd342];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1857,%r1858,%r1859,%r1860}, [%rd343];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1861,%r1862,%r1863,%r1864}, [%rd344];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1865,%r1866,%r1867,%r1868}, [%rd345];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1869,%r1870,%r1871,%r1872}, [%rd346];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1873,%r1874,%r1875,%r1876}, [%rd347];
	// end inline asm
	st.v4.u32 	[%rd349], {%r1845, %r1846, %r1847, %r1848};
	st.v4.u32 	[%rd349+512], {%r1849, %r1850, %r1851, %r1852};
	st.v4.u32 	[%rd349+1024], {%r1853, %r1854, %r1855, %r1856};
	st.v4.u32 	[%rd349+1536], {%r1857, %r1858, %r1859, %r1860};
	st.v4.u32 	[%rd349+2048], {%r1861, %r1862, %r1863, %r1864};
	st.v4.u32 	[%rd349+2560], {%r1865, %r1866, %r1867, %r1868};
	st.v4.u32 	[%rd349+3072], {%r1869, %r1870, %r1871, %r1872};
	st.v4.u32 	[%rd349+3584], {%r1873, %r1874, %r1875, %r1876};
	add.s64 	%rd416, %rd415, 256;
	add.s64 	%rd350, %rd415, 480;
	setp.lt.u64 	%p49, %rd350, %rd17;
	mov.u64 	%rd415, %rd416;
	@%p49 bra 	$L__BB0_59;
$L__BB0_60:
	setp.ge.u64 	%p50, %rd416, %rd17;
	@%p50 bra 	$L__BB0_67;
	not.b64 	%rd351, %rd416;
	add.s64 	%rd104, %rd17, %rd351;
	shr.u64 	%rd352, %rd104, 5;
	add.s64 	%rd353, %rd352, 1;
	and.b64  	%rd105, %rd353, 3;
	setp.eq.s64 	%p51, %rd105, 0;
	mov.u64 	%rd417, %rd416;
	@%p51 bra 	$L__BB0_65;
	shl.b64 	%rd355, %rd416, 4;
	add.s64 	%rd354, %rd19, %rd355;
	add.s64 	%rd107, %rd15, %rd355;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1877,%r1878,%r1879,%r1880}, [%rd354];
	// end inline asm
	st.v4.u32 	[%rd107], {%r1877, %r1878, %r1879, %r1880};
	add.s64 	%rd417, %rd416, 32;
	setp.eq.s64 	%p52, %rd105, 1;
	@%p52 bra 	$L__BB0_65;
	add.s64 	%rd356, %rd354, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1881,%r1882,%r1883,%r1884}, [%rd356];
	// end inline asm
	st.v4.u32 	[%rd107+512], {%r1881, %r1882, %r1883, %r1884};
	add.s64 	%rd417, %rd416, 64;
	setp.eq.s64 	%p53, %rd105, 2;
	@%p53 bra 	$L__BB0_65;
	add.s64 	%rd357, %rd354, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1885,%r1886,%r1887,%r1888}, [%rd357];
	// end inline asm
	st.v4.u32 	[%rd107+1024], {%r1885, %r1886, %r1887, %r1888};
	add.s64 	%rd417, %rd416, 96;
$L__BB0_65:
	setp.lt.u64 	%p54, %rd104, 96;
	@%p54 bra 	$L__BB0_67;
$L__BB0_66:
	shl.b64 	%rd362, %rd417, 4;
	add.s64 	%rd358, %rd19, %rd362;
	add.s64 	%rd363, %rd15, %rd362;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1889,%r1890,%r1891,%r1892}, [%rd358];
	// end inline asm
	st.v4.u32 	[%rd363], {%r1889, %r1890, %r1891, %r1892};
	add.s64 	%rd359, %rd358, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1893,%r1894,%r1895,%r1896}, [%rd359];
	// end inline asm
	st.v4.u32 	[%rd363+512], {%r1893, %r1894, %r1895, %r1896};
	add.s64 	%rd360, %rd358, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1897,%r1898,%r1899,%r1900}, [%rd360];
	// end inline asm
	st.v4.u32 	[%rd363+1024], {%r1897, %r1898, %r1899, %r1900};
	add.s64 	%rd361, %rd358, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1901,%r1902,%r1903,%r1904}, [%rd361];
	// end inline asm
	st.v4.u32 	[%rd363+1536], {%r1901, %r1902, %r1903, %r1904};
	add.s64 	%rd417, %rd417, 128;
	setp.lt.u64 	%p55, %rd417, %rd17;
	@%p55 bra 	$L__BB0_66;
	bra.uni 	$L__BB0_67;
$L__BB0_6:
	setp.lt.u32 	%p6, %r18, 8;
	@%p6 bra 	$L__BB0_33;
	bra.uni 	$L__BB0_7;
$L__BB0_33:
	or.b64  	%rd237, %rd4, 96;
	setp.ge.u64 	%p28, %rd237, %rd17;
	mov.u64 	%rd407, %rd4;
	@%p28 bra 	$L__BB0_38;
	add.s64 	%rd71, %rd5, %rd17;
	and.b64  	%rd238, %rd71, 128;
	setp.ne.s64 	%p29, %rd238, 0;
	mov.u64 	%rd406, %rd4;
	@%p29 bra 	$L__BB0_36;
	add.s64 	%rd239, %rd19, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r933,%r934,%r935,%r936}, [%rd239];
	// end inline asm
	add.s64 	%rd240, %rd239, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r937,%r938,%r939,%r940}, [%rd240];
	// end inline asm
	add.s64 	%rd241, %rd239, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r941,%r942,%r943,%r944}, [%rd241];
	// end inline asm
	add.s64 	%rd242, %rd239, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r945,%r946,%r947,%r948}, [%rd242];
	// end inline asm
	add.s64 	%rd243, %rd239, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r949,%r950,%r951,%r952}, [%rd243];
	// end inline asm
	add.s64 	%rd244, %rd239, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r953,%r954,%r955,%r956}, [%rd244];
	// end inline asm
	add.s64 	%rd245, %rd239, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r957,%r958,%r959,%r960}, [%rd245];
	// end inline asm
	add.s64 	%rd246, %rd239, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r961,%r962,%r963,%r964}, [%rd246];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r965, %r934, %r935, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r969, %r935, %r936, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r973, %r936, %r949, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r977, %r949, %r950, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r981, %r938, %r939, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r985, %r939, %r940, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r989, %r940, %r953, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r993, %r953, %r954, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r997, %r942, %r943, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1001, %r943, %r944, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1005, %r944, %r957, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1009, %r957, %r958, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1013, %r946, %r947, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1017, %r947, %r948, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1021, %r948, %r961, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1025, %r961, %r962, %r7;
	// end inline asm
	st.v4.u32 	[%rd20], {%r965, %r969, %r973, %r977};
	st.v4.u32 	[%rd20+512], {%r981, %r985, %r989, %r993};
	st.v4.u32 	[%rd20+1024], {%r997, %r1001, %r1005, %r1009};
	st.v4.u32 	[%rd20+1536], {%r1013, %r1017, %r1021, %r1025};
	mov.u64 	%rd406, %rd6;
$L__BB0_36:
	and.b64  	%rd248, %rd71, -128;
	setp.eq.s64 	%p30, %rd248, 0;
	mov.u64 	%rd407, %rd6;
	@%p30 bra 	$L__BB0_38;
$L__BB0_37:
	shl.b64 	%rd265, %rd406, 4;
	add.s64 	%rd249, %rd19, %rd265;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1029,%r1030,%r1031,%r1032}, [%rd249];
	// end inline asm
	add.s64 	%rd250, %rd249, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1033,%r1034,%r1035,%r1036}, [%rd250];
	// end inline asm
	add.s64 	%rd251, %rd249, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1037,%r1038,%r1039,%r1040}, [%rd251];
	// end inline asm
	add.s64 	%rd252, %rd249, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1041,%r1042,%r1043,%r1044}, [%rd252];
	// end inline asm
	add.s64 	%rd253, %rd249, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1045,%r1046,%r1047,%r1048}, [%rd253];
	// end inline asm
	add.s64 	%rd254, %rd249, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1049,%r1050,%r1051,%r1052}, [%rd254];
	// end inline asm
	add.s64 	%rd255, %rd249, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1053,%r1054,%r1055,%r1056}, [%rd255];
	// end inline asm
	add.s64 	%rd256, %rd249, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1057,%r1058,%r1059,%r1060}, [%rd256];
	// end inline asm
	add.s64 	%rd266, %rd15, %rd265;
	// begin inline asm
	shf.r.wrap.b32 %r1061, %r1030, %r1031, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1065, %r1031, %r1032, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1069, %r1032, %r1045, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1073, %r1045, %r1046, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1077, %r1034, %r1035, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1081, %r1035, %r1036, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1085, %r1036, %r1049, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1089, %r1049, %r1050, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1093, %r1038, %r1039, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1097, %r1039, %r1040, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1101, %r1040, %r1053, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1105, %r1053, %r1054, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1109, %r1042, %r1043, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1113, %r1043, %r1044, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1117, %r1044, %r1057, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1121, %r1057, %r1058, %r7;
	// end inline asm
	st.v4.u32 	[%rd266], {%r1061, %r1065, %r1069, %r1073};
	st.v4.u32 	[%rd266+512], {%r1077, %r1081, %r1085, %r1089};
	st.v4.u32 	[%rd266+1024], {%r1093, %r1097, %r1101, %r1105};
	st.v4.u32 	[%rd266+1536], {%r1109, %r1113, %r1117, %r1121};
	add.s64 	%rd257, %rd249, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1125,%r1126,%r1127,%r1128}, [%rd257];
	// end inline asm
	add.s64 	%rd258, %rd249, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1129,%r1130,%r1131,%r1132}, [%rd258];
	// end inline asm
	add.s64 	%rd259, %rd249, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1133,%r1134,%r1135,%r1136}, [%rd259];
	// end inline asm
	add.s64 	%rd260, %rd249, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1137,%r1138,%r1139,%r1140}, [%rd260];
	// end inline asm
	add.s64 	%rd261, %rd249, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1141,%r1142,%r1143,%r1144}, [%rd261];
	// end inline asm
	add.s64 	%rd262, %rd249, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1145,%r1146,%r1147,%r1148}, [%rd262];
	// end inline asm
	add.s64 	%rd263, %rd249, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1149,%r1150,%r1151,%r1152}, [%rd263];
	// end inline asm
	add.s64 	%rd264, %rd249, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1153,%r1154,%r1155,%r1156}, [%rd264];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1157, %r1126, %r1127, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1161, %r1127, %r1128, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1165, %r1128, %r1141, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1169, %r1141, %r1142, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1173, %r1130, %r1131, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1177, %r1131, %r1132, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1181, %r1132, %r1145, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1185, %r1145, %r1146, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1189, %r1134, %r1135, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1193, %r1135, %r1136, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1197, %r1136, %r1149, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1201, %r1149, %r1150, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1205, %r1138, %r1139, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1209, %r1139, %r1140, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1213, %r1140, %r1153, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1217, %r1153, %r1154, %r7;
	// end inline asm
	st.v4.u32 	[%rd266+2048], {%r1157, %r1161, %r1165, %r1169};
	st.v4.u32 	[%rd266+2560], {%r1173, %r1177, %r1181, %r1185};
	st.v4.u32 	[%rd266+3072], {%r1189, %r1193, %r1197, %r1201};
	st.v4.u32 	[%rd266+3584], {%r1205, %r1209, %r1213, %r1217};
	add.s64 	%rd407, %rd406, 256;
	add.s64 	%rd267, %rd406, 352;
	setp.lt.u64 	%p31, %rd267, %rd17;
	mov.u64 	%rd406, %rd407;
	@%p31 bra 	$L__BB0_37;
$L__BB0_38:
	setp.ge.u64 	%p32, %rd407, %rd17;
	@%p32 bra 	$L__BB0_67;
	not.b64 	%rd268, %rd407;
	add.s64 	%rd76, %rd17, %rd268;
	shr.u64 	%rd269, %rd76, 5;
	add.s64 	%rd270, %rd269, 1;
	and.b64  	%rd77, %rd270, 3;
	setp.eq.s64 	%p33, %rd77, 0;
	mov.u64 	%rd408, %rd407;
	@%p33 bra 	$L__BB0_43;
	shl.b64 	%rd273, %rd407, 4;
	add.s64 	%rd271, %rd19, %rd273;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1221,%r1222,%r1223,%r1224}, [%rd271];
	// end inline asm
	add.s64 	%rd272, %rd271, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1225,%r1226,%r1227,%r1228}, [%rd272];
	// end inline asm
	add.s64 	%rd79, %rd15, %rd273;
	// begin inline asm
	shf.r.wrap.b32 %r1229, %r1222, %r1223, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1233, %r1223, %r1224, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1237, %r1224, %r1225, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1241, %r1225, %r1226, %r7;
	// end inline asm
	st.v4.u32 	[%rd79], {%r1229, %r1233, %r1237, %r1241};
	add.s64 	%rd408, %rd407, 32;
	setp.eq.s64 	%p34, %rd77, 1;
	@%p34 bra 	$L__BB0_43;
	add.s64 	%rd274, %rd271, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1245,%r1246,%r1247,%r1248}, [%rd274];
	// end inline asm
	add.s64 	%rd275, %rd271, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1249,%r1250,%r1251,%r1252}, [%rd275];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1253, %r1246, %r1247, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1257, %r1247, %r1248, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1261, %r1248, %r1249, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1265, %r1249, %r1250, %r7;
	// end inline asm
	st.v4.u32 	[%rd79+512], {%r1253, %r1257, %r1261, %r1265};
	add.s64 	%rd408, %rd407, 64;
	setp.eq.s64 	%p35, %rd77, 2;
	@%p35 bra 	$L__BB0_43;
	add.s64 	%rd276, %rd271, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1269,%r1270,%r1271,%r1272}, [%rd276];
	// end inline asm
	add.s64 	%rd277, %rd271, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1273,%r1274,%r1275,%r1276}, [%rd277];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1277, %r1270, %r1271, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1281, %r1271, %r1272, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1285, %r1272, %r1273, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1289, %r1273, %r1274, %r7;
	// end inline asm
	st.v4.u32 	[%rd79+1024], {%r1277, %r1281, %r1285, %r1289};
	add.s64 	%rd408, %rd407, 96;
$L__BB0_43:
	setp.lt.u64 	%p36, %rd76, 96;
	@%p36 bra 	$L__BB0_67;
$L__BB0_44:
	shl.b64 	%rd286, %rd408, 4;
	add.s64 	%rd278, %rd19, %rd286;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1293,%r1294,%r1295,%r1296}, [%rd278];
	// end inline asm
	add.s64 	%rd279, %rd278, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1297,%r1298,%r1299,%r1300}, [%rd279];
	// end inline asm
	add.s64 	%rd287, %rd15, %rd286;
	// begin inline asm
	shf.r.wrap.b32 %r1301, %r1294, %r1295, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1305, %r1295, %r1296, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1309, %r1296, %r1297, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1313, %r1297, %r1298, %r7;
	// end inline asm
	st.v4.u32 	[%rd287], {%r1301, %r1305, %r1309, %r1313};
	add.s64 	%rd280, %rd278, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1317,%r1318,%r1319,%r1320}, [%rd280];
	// end inline asm
	add.s64 	%rd281, %rd278, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1321,%r1322,%r1323,%r1324}, [%rd281];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1325, %r1318, %r1319, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1329, %r1319, %r1320, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1333, %r1320, %r1321, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1337, %r1321, %r1322, %r7;
	// end inline asm
	st.v4.u32 	[%rd287+512], {%r1325, %r1329, %r1333, %r1337};
	add.s64 	%rd282, %rd278, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1341,%r1342,%r1343,%r1344}, [%rd282];
	// end inline asm
	add.s64 	%rd283, %rd278, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1345,%r1346,%r1347,%r1348}, [%rd283];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1349, %r1342, %r1343, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1353, %r1343, %r1344, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1357, %r1344, %r1345, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1361, %r1345, %r1346, %r7;
	// end inline asm
	st.v4.u32 	[%rd287+1024], {%r1349, %r1353, %r1357, %r1361};
	add.s64 	%rd284, %rd278, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1365,%r1366,%r1367,%r1368}, [%rd284];
	// end inline asm
	add.s64 	%rd285, %rd278, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1369,%r1370,%r1371,%r1372}, [%rd285];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1373, %r1366, %r1367, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1377, %r1367, %r1368, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1381, %r1368, %r1369, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1385, %r1369, %r1370, %r7;
	// end inline asm
	st.v4.u32 	[%rd287+1536], {%r1373, %r1377, %r1381, %r1385};
	add.s64 	%rd408, %rd408, 128;
	setp.lt.u64 	%p37, %rd408, %rd17;
	@%p37 bra 	$L__BB0_44;
	bra.uni 	$L__BB0_67;
$L__BB0_7:
	setp.lt.u32 	%p7, %r18, 12;
	@%p7 bra 	$L__BB0_21;
	bra.uni 	$L__BB0_8;
$L__BB0_21:
	or.b64  	%rd186, %rd4, 96;
	setp.ge.u64 	%p18, %rd186, %rd17;
	mov.u64 	%rd402, %rd4;
	@%p18 bra 	$L__BB0_26;
	add.s64 	%rd56, %rd5, %rd17;
	and.b64  	%rd187, %rd56, 128;
	setp.ne.s64 	%p19, %rd187, 0;
	mov.u64 	%rd401, %rd4;
	@%p19 bra 	$L__BB0_24;
	add.s64 	%rd188, %rd19, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r477,%r478,%r479,%r480}, [%rd188];
	// end inline asm
	add.s64 	%rd189, %rd188, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r481,%r482,%r483,%r484}, [%rd189];
	// end inline asm
	add.s64 	%rd190, %rd188, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r485,%r486,%r487,%r488}, [%rd190];
	// end inline asm
	add.s64 	%rd191, %rd188, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r489,%r490,%r491,%r492}, [%rd191];
	// end inline asm
	add.s64 	%rd192, %rd188, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r493,%r494,%r495,%r496}, [%rd192];
	// end inline asm
	add.s64 	%rd193, %rd188, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r497,%r498,%r499,%r500}, [%rd193];
	// end inline asm
	add.s64 	%rd194, %rd188, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r501,%r502,%r503,%r504}, [%rd194];
	// end inline asm
	add.s64 	%rd195, %rd188, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r505,%r506,%r507,%r508}, [%rd195];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r509, %r479, %r480, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r513, %r480, %r493, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r517, %r493, %r494, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r521, %r494, %r495, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r525, %r483, %r484, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r529, %r484, %r497, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r533, %r497, %r498, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r537, %r498, %r499, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r541, %r487, %r488, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r545, %r488, %r501, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r549, %r501, %r502, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r553, %r502, %r503, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r557, %r491, %r492, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r561, %r492, %r505, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r565, %r505, %r506, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r569, %r506, %r507, %r7;
	// end inline asm
	st.v4.u32 	[%rd20], {%r509, %r513, %r517, %r521};
	st.v4.u32 	[%rd20+512], {%r525, %r529, %r533, %r537};
	st.v4.u32 	[%rd20+1024], {%r541, %r545, %r549, %r553};
	st.v4.u32 	[%rd20+1536], {%r557, %r561, %r565, %r569};
	mov.u64 	%rd401, %rd6;
$L__BB0_24:
	and.b64  	%rd197, %rd56, -128;
	setp.eq.s64 	%p20, %rd197, 0;
	mov.u64 	%rd402, %rd6;
	@%p20 bra 	$L__BB0_26;
$L__BB0_25:
	shl.b64 	%rd214, %rd401, 4;
	add.s64 	%rd198, %rd19, %rd214;
	// begin inline asm
	ld.global.cs.v4.u32 {%r573,%r574,%r575,%r576}, [%rd198];
	// end inline asm
	add.s64 	%rd199, %rd198, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r577,%r578,%r579,%r580}, [%rd199];
	// end inline asm
	add.s64 	%rd200, %rd198, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r581,%r582,%r583,%r584}, [%rd200];
	// end inline asm
	add.s64 	%rd201, %rd198, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r585,%r586,%r587,%r588}, [%rd201];
	// end inline asm
	add.s64 	%rd202, %rd198, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r589,%r590,%r591,%r592}, [%rd202];
	// end inline asm
	add.s64 	%rd203, %rd198, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r593,%r594,%r595,%r596}, [%rd203];
	// end inline asm
	add.s64 	%rd204, %rd198, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r597,%r598,%r599,%r600}, [%rd204];
	// end inline asm
	add.s64 	%rd205, %rd198, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r601,%r602,%r603,%r604}, [%rd205];
	// end inline asm
	add.s64 	%rd215, %rd15, %rd214;
	// begin inline asm
	shf.r.wrap.b32 %r605, %r575, %r576, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r609, %r576, %r589, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r613, %r589, %r590, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r617, %r590, %r591, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r621, %r579, %r580, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r625, %r580, %r593, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r629, %r593, %r594, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r633, %r594, %r595, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r637, %r583, %r584, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r641, %r584, %r597, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r645, %r597, %r598, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r649, %r598, %r599, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r653, %r587, %r588, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r657, %r588, %r601, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r661, %r601, %r602, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r665, %r602, %r603, %r7;
	// end inline asm
	st.v4.u32 	[%rd215], {%r605, %r609, %r613, %r617};
	st.v4.u32 	[%rd215+512], {%r621, %r625, %r629, %r633};
	st.v4.u32 	[%rd215+1024], {%r637, %r641, %r645, %r649};
	st.v4.u32 	[%rd215+1536], {%r653, %r657, %r661, %r665};
	add.s64 	%rd206, %rd198, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r669,%r670,%r671,%r672}, [%rd206];
	// end inline asm
	add.s64 	%rd207, %rd198, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r673,%r674,%r675,%r676}, [%rd207];
	// end inline asm
	add.s64 	%rd208, %rd198, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r677,%r678,%r679,%r680}, [%rd208];
	// end inline asm
	add.s64 	%rd209, %rd198, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r681,%r682,%r683,%r684}, [%rd209];
	// end inline asm
	add.s64 	%rd210, %rd198, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r685,%r686,%r687,%r688}, [%rd210];
	// end inline asm
	add.s64 	%rd211, %rd198, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r689,%r690,%r691,%r692}, [%rd211];
	// end inline asm
	add.s64 	%rd212, %rd198, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r693,%r694,%r695,%r696}, [%rd212];
	// end inline asm
	add.s64 	%rd213, %rd198, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r697,%r698,%r699,%r700}, [%rd213];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r701, %r671, %r672, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r705, %r672, %r685, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r709, %r685, %r686, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r713, %r686, %r687, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r717, %r675, %r676, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r721, %r676, %r689, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r725, %r689, %r690, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r729, %r690, %r691, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r733, %r679, %r680, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r737, %r680, %r693, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r741, %r693, %r694, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r745, %r694, %r695, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r749, %r683, %r684, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r753, %r684, %r697, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r757, %r697, %r698, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r761, %r698, %r699, %r7;
	// end inline asm
	st.v4.u32 	[%rd215+2048], {%r701, %r705, %r709, %r713};
	st.v4.u32 	[%rd215+2560], {%r717, %r721, %r725, %r729};
	st.v4.u32 	[%rd215+3072], {%r733, %r737, %r741, %r745};
	st.v4.u32 	[%rd215+3584], {%r749, %r753, %r757, %r761};
	add.s64 	%rd402, %rd401, 256;
	add.s64 	%rd216, %rd401, 352;
	setp.lt.u64 	%p21, %rd216, %rd17;
	mov.u64 	%rd401, %rd402;
	@%p21 bra 	$L__BB0_25;
$L__BB0_26:
	setp.ge.u64 	%p22, %rd402, %rd17;
	@%p22 bra 	$L__BB0_67;
	not.b64 	%rd217, %rd402;
	add.s64 	%rd61, %rd17, %rd217;
	shr.u64 	%rd218, %rd61, 5;
	add.s64 	%rd219, %rd218, 1;
	and.b64  	%rd62, %rd219, 3;
	setp.eq.s64 	%p23, %rd62, 0;
	mov.u64 	%rd403, %rd402;
	@%p23 bra 	$L__BB0_31;
	shl.b64 	%rd222, %rd402, 4;
	add.s64 	%rd220, %rd19, %rd222;
	// begin inline asm
	ld.global.cs.v4.u32 {%r765,%r766,%r767,%r768}, [%rd220];
	// end inline asm
	add.s64 	%rd221, %rd220, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r769,%r770,%r771,%r772}, [%rd221];
	// end inline asm
	add.s64 	%rd64, %rd15, %rd222;
	// begin inline asm
	shf.r.wrap.b32 %r773, %r767, %r768, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r777, %r768, %r769, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r781, %r769, %r770, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r785, %r770, %r771, %r7;
	// end inline asm
	st.v4.u32 	[%rd64], {%r773, %r777, %r781, %r785};
	add.s64 	%rd403, %rd402, 32;
	setp.eq.s64 	%p24, %rd62, 1;
	@%p24 bra 	$L__BB0_31;
	add.s64 	%rd223, %rd220, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r789,%r790,%r791,%r792}, [%rd223];
	// end inline asm
	add.s64 	%rd224, %rd220, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r793,%r794,%r795,%r796}, [%rd224];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r797, %r791, %r792, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r801, %r792, %r793, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r805, %r793, %r794, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r809, %r794, %r795, %r7;
	// end inline asm
	st.v4.u32 	[%rd64+512], {%r797, %r801, %r805, %r809};
	add.s64 	%rd403, %rd402, 64;
	setp.eq.s64 	%p25, %rd62, 2;
	@%p25 bra 	$L__BB0_31;
	add.s64 	%rd225, %rd220, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r813,%r814,%r815,%r816}, [%rd225];
	// end inline asm
	add.s64 	%rd226, %rd220, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r817,%r818,%r819,%r820}, [%rd226];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r821, %r815, %r816, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r825, %r816, %r817, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r829, %r817, %r818, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r833, %r818, %r819, %r7;
	// end inline asm
	st.v4.u32 	[%rd64+1024], {%r821, %r825, %r829, %r833};
	add.s64 	%rd403, %rd402, 96;
$L__BB0_31:
	setp.lt.u64 	%p26, %rd61, 96;
	@%p26 bra 	$L__BB0_67;
$L__BB0_32:
	shl.b64 	%rd235, %rd403, 4;
	add.s64 	%rd227, %rd19, %rd235;
	// begin inline asm
	ld.global.cs.v4.u32 {%r837,%r838,%r839,%r840}, [%rd227];
	// end inline asm
	add.s64 	%rd228, %rd227, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r841,%r842,%r843,%r844}, [%rd228];
	// end inline asm
	add.s64 	%rd236, %rd15, %rd235;
	// begin inline asm
	shf.r.wrap.b32 %r845, %r839, %r840, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r849, %r840, %r841, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r853, %r841, %r842, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r857, %r842, %r843, %r7;
	// end inline asm
	st.v4.u32 	[%rd236], {%r845, %r849, %r853, %r857};
	add.s64 	%rd229, %rd227, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r861,%r862,%r863,%r864}, [%rd229];
	// end inline asm
	add.s64 	%rd230, %rd227, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r865,%r866,%r867,%r868}, [%rd230];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r869, %r863, %r864, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r873, %r864, %r865, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r877, %r865, %r866, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r881, %r866, %r867, %r7;
	// end inline asm
	st.v4.u32 	[%rd236+512], {%r869, %r873, %r877, %r881};
	add.s64 	%rd231, %rd227, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r885,%r886,%r887,%r888}, [%rd231];
	// end inline asm
	add.s64 	%rd232, %rd227, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r889,%r890,%r891,%r892}, [%rd232];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r893, %r887, %r888, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r897, %r888, %r889, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r901, %r889, %r890, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r905, %r890, %r891, %r7;
	// end inline asm
	st.v4.u32 	[%rd236+1024], {%r893, %r897, %r901, %r905};
	add.s64 	%rd233, %rd227, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r909,%r910,%r911,%r912}, [%rd233];
	// end inline asm
	add.s64 	%rd234, %rd227, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r913,%r914,%r915,%r916}, [%rd234];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r917, %r911, %r912, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r921, %r912, %r913, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r925, %r913, %r914, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r929, %r914, %r915, %r7;
	// end inline asm
	st.v4.u32 	[%rd236+1536], {%r917, %r921, %r925, %r929};
	add.s64 	%rd403, %rd403, 128;
	setp.lt.u64 	%p27, %rd403, %rd17;
	@%p27 bra 	$L__BB0_32;
	bra.uni 	$L__BB0_67;
$L__BB0_8:
	or.b64  	%rd131, %rd4, 96;
	setp.ge.u64 	%p8, %rd131, %rd17;
	mov.u64 	%rd397, %rd4;
	@%p8 bra 	$L__BB0_14;
	add.s64 	%rd21, %rd5, %rd17;
	and.b64  	%rd132, %rd21, 128;
	setp.ne.s64 	%p9, %rd132, 0;
	mov.u64 	%rd396, %rd4;
	@%p9 bra 	$L__BB0_11;
	add.s64 	%rd133, %rd19, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r21,%r22,%r23,%r24}, [%rd133];
	// end inline asm
	add.s64 	%rd134, %rd133, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r25,%r26,%r27,%r28}, [%rd134];
	// end inline asm
	add.s64 	%rd135, %rd133, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r29,%r30,%r31,%r32}, [%rd135];
	// end inline asm
	add.s64 	%rd136, %rd133, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r33,%r34,%r35,%r36}, [%rd136];
	// end inline asm
	add.s64 	%rd137, %rd133, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r37,%r38,%r39,%r40}, [%rd137];
	// end inline asm
	add.s64 	%rd138, %rd133, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r41,%r42,%r43,%r44}, [%rd138];
	// end inline asm
	add.s64 	%rd139, %rd133, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r45,%r46,%r47,%r48}, [%rd139];
	// end inline asm
	add.s64 	%rd140, %rd133, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r49,%r50,%r51,%r52}, [%rd140];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r53, %r24, %r37, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r57, %r37, %r38, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r61, %r38, %r39, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r65, %r39, %r40, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r69, %r28, %r41, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r73, %r41, %r42, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r77, %r42, %r43, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r81, %r43, %r44, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r85, %r32, %r45, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r89, %r45, %r46, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r93, %r46, %r47, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r97, %r47, %r48, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r101, %r36, %r49, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r105, %r49, %r50, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r109, %r50, %r51, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r113, %r51, %r52, %r7;
	// end inline asm
	st.v4.u32 	[%rd20], {%r53, %r57, %r61, %r65};
	st.v4.u32 	[%rd20+512], {%r69, %r73, %r77, %r81};
	st.v4.u32 	[%rd20+1024], {%r85, %r89, %r93, %r97};
	st.v4.u32 	[%rd20+1536], {%r101, %r105, %r109, %r113};
	mov.u64 	%rd396, %rd6;
$L__BB0_11:
	and.b64  	%rd142, %rd21, -128;
	setp.eq.s64 	%p10, %rd142, 0;
	mov.u64 	%rd397, %rd6;
	@%p10 bra 	$L__BB0_14;
	sub.s64 	%rd143, %rd393, %rd18;
	add.s64 	%rd23, %rd143, -1;
	not.b64 	%rd144, %rd391;
	not.b64 	%rd145, %rd13;
	max.u64 	%rd146, %rd145, %rd144;
	shl.b64 	%rd147, %rd396, 4;
	sub.s64 	%rd395, %rd147, %rd146;
	add.s64 	%rd28, %rd143, 15;
	add.s64 	%rd29, %rd143, 527;
	add.s64 	%rd30, %rd143, 1039;
	add.s64 	%rd32, %rd143, 3599;
	add.s64 	%rd33, %rd143, 3087;
	add.s64 	%rd34, %rd143, 2575;
	add.s64 	%rd35, %rd143, 2063;
	add.s64 	%rd36, %rd143, 3583;
	add.s64 	%rd37, %rd143, 3071;
	add.s64 	%rd38, %rd143, 2559;
	add.s64 	%rd39, %rd143, 2047;
	add.s64 	%rd40, %rd143, 1551;
$L__BB0_13:
	add.s64 	%rd390, %rd393, %rd375;
	and.b64  	%rd389, %rd390, 15;
	sub.s64 	%rd388, %rd393, %rd389;
	add.s64 	%rd387, %rd388, 1535;
	add.s64 	%rd386, %rd388, 1023;
	neg.s64 	%rd385, %rd392;
	and.b64  	%rd384, %rd385, 15;
	min.u64 	%rd383, %rd384, %rd391;
	add.s64 	%rd382, %rd388, 511;
	add.s64 	%rd381, %rd392, -1;
	add.s64 	%rd148, %rd23, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r117,%r118,%r119,%r120}, [%rd148];
	// end inline asm
	add.s64 	%rd149, %rd382, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r121,%r122,%r123,%r124}, [%rd149];
	// end inline asm
	add.s64 	%rd150, %rd386, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r125,%r126,%r127,%r128}, [%rd150];
	// end inline asm
	add.s64 	%rd151, %rd387, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r129,%r130,%r131,%r132}, [%rd151];
	// end inline asm
	add.s64 	%rd152, %rd28, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r133,%r134,%r135,%r136}, [%rd152];
	// end inline asm
	add.s64 	%rd153, %rd29, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r137,%r138,%r139,%r140}, [%rd153];
	// end inline asm
	add.s64 	%rd154, %rd30, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r141,%r142,%r143,%r144}, [%rd154];
	// end inline asm
	add.s64 	%rd155, %rd40, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r145,%r146,%r147,%r148}, [%rd155];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r149, %r120, %r133, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r153, %r133, %r134, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r157, %r134, %r135, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r161, %r135, %r136, %r7;
	// end inline asm
	add.s64 	%rd164, %rd381, %rd395;
	// begin inline asm
	shf.r.wrap.b32 %r165, %r124, %r137, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r169, %r137, %r138, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r173, %r138, %r139, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r177, %r139, %r140, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r181, %r128, %r141, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r185, %r141, %r142, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r189, %r142, %r143, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r193, %r143, %r144, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r197, %r132, %r145, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r201, %r145, %r146, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r205, %r146, %r147, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r209, %r147, %r148, %r7;
	// end inline asm
	st.v4.u32 	[%rd164], {%r149, %r153, %r157, %r161};
	st.v4.u32 	[%rd164+512], {%r165, %r169, %r173, %r177};
	st.v4.u32 	[%rd164+1024], {%r181, %r185, %r189, %r193};
	st.v4.u32 	[%rd164+1536], {%r197, %r201, %r205, %r209};
	add.s64 	%rd156, %rd39, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r213,%r214,%r215,%r216}, [%rd156];
	// end inline asm
	add.s64 	%rd157, %rd38, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r217,%r218,%r219,%r220}, [%rd157];
	// end inline asm
	add.s64 	%rd158, %rd37, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r221,%r222,%r223,%r224}, [%rd158];
	// end inline asm
	add.s64 	%rd159, %rd36, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r225,%r226,%r227,%r228}, [%rd159];
	// end inline asm
	add.s64 	%rd160, %rd35, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r229,%r230,%r231,%r232}, [%rd160];
	// end inline asm
	add.s64 	%rd161, %rd34, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r233,%r234,%r235,%r236}, [%rd161];
	// end inline asm
	add.s64 	%rd162, %rd33, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r237,%r238,%r239,%r240}, [%rd162];
	// end inline asm
	add.s64 	%rd163, %rd32, %rd395;
	// begin inline asm
	ld.global.cs.v4.u32 {%r241,%r242,%r243,%r244}, [%rd163];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r245, %r216, %r229, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r249, %r229, %r230, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r253, %r230, %r231, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r257, %r231, %r232, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r261, %r220, %r233, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r265, %r233, %r234, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r269, %r234, %r235, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r273, %r235, %r236, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r277, %r224, %r237, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r281, %r237, %r238, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r285, %r238, %r239, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r289, %r239, %r240, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r293, %r228, %r241, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r297, %r241, %r242, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r301, %r242, %r243, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r305, %r243, %r244, %r7;
	// end inline asm
	st.v4.u32 	[%rd164+2048], {%r245, %r249, %r253, %r257};
	st.v4.u32 	[%rd164+2560], {%r261, %r265, %r269, %r273};
	st.v4.u32 	[%rd164+3072], {%r277, %r281, %r285, %r289};
	st.v4.u32 	[%rd164+3584], {%r293, %r297, %r301, %r305};
	add.s64 	%rd397, %rd396, 256;
	add.s64 	%rd165, %rd396, 352;
	add.s64 	%rd395, %rd395, 4096;
	setp.lt.u64 	%p11, %rd165, %rd17;
	mov.u64 	%rd396, %rd397;
	@%p11 bra 	$L__BB0_13;
$L__BB0_14:
	setp.ge.u64 	%p12, %rd397, %rd17;
	@%p12 bra 	$L__BB0_67;
	not.b64 	%rd166, %rd397;
	add.s64 	%rd46, %rd17, %rd166;
	shr.u64 	%rd167, %rd46, 5;
	add.s64 	%rd168, %rd167, 1;
	and.b64  	%rd47, %rd168, 3;
	setp.eq.s64 	%p13, %rd47, 0;
	mov.u64 	%rd398, %rd397;
	@%p13 bra 	$L__BB0_19;
	shl.b64 	%rd171, %rd397, 4;
	add.s64 	%rd169, %rd19, %rd171;
	// begin inline asm
	ld.global.cs.v4.u32 {%r309,%r310,%r311,%r312}, [%rd169];
	// end inline asm
	add.s64 	%rd170, %rd169, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r313,%r314,%r315,%r316}, [%rd170];
	// end inline asm
	add.s64 	%rd49, %rd15, %rd171;
	// begin inline asm
	shf.r.wrap.b32 %r317, %r312, %r313, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r321, %r313, %r314, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r325, %r314, %r315, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r329, %r315, %r316, %r7;
	// end inline asm
	st.v4.u32 	[%rd49], {%r317, %r321, %r325, %r329};
	add.s64 	%rd398, %rd397, 32;
	setp.eq.s64 	%p14, %rd47, 1;
	@%p14 bra 	$L__BB0_19;
	add.s64 	%rd172, %rd169, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r333,%r334,%r335,%r336}, [%rd172];
	// end inline asm
	add.s64 	%rd173, %rd169, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r337,%r338,%r339,%r340}, [%rd173];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r341, %r336, %r337, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r345, %r337, %r338, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r349, %r338, %r339, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r353, %r339, %r340, %r7;
	// end inline asm
	st.v4.u32 	[%rd49+512], {%r341, %r345, %r349, %r353};
	add.s64 	%rd398, %rd397, 64;
	setp.eq.s64 	%p15, %rd47, 2;
	@%p15 bra 	$L__BB0_19;
	add.s64 	%rd174, %rd169, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r357,%r358,%r359,%r360}, [%rd174];
	// end inline asm
	add.s64 	%rd175, %rd169, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r361,%r362,%r363,%r364}, [%rd175];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r365, %r360, %r361, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r369, %r361, %r362, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r373, %r362, %r363, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r377, %r363, %r364, %r7;
	// end inline asm
	st.v4.u32 	[%rd49+1024], {%r365, %r369, %r373, %r377};
	add.s64 	%rd398, %rd397, 96;
$L__BB0_19:
	setp.lt.u64 	%p16, %rd46, 96;
	@%p16 bra 	$L__BB0_67;
$L__BB0_20:
	shl.b64 	%rd184, %rd398, 4;
	add.s64 	%rd176, %rd19, %rd184;
	// begin inline asm
	ld.global.cs.v4.u32 {%r381,%r382,%r383,%r384}, [%rd176];
	// end inline asm
	add.s64 	%rd177, %rd176, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r385,%r386,%r387,%r388}, [%rd177];
	// end inline asm
	add.s64 	%rd185, %rd15, %rd184;
	// begin inline asm
	shf.r.wrap.b32 %r389, %r384, %r385, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r393, %r385, %r386, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r397, %r386, %r387, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r401, %r387, %r388, %r7;
	// end inline asm
	st.v4.u32 	[%rd185], {%r389, %r393, %r397, %r401};
	add.s64 	%rd178, %rd176, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r405,%r406,%r407,%r408}, [%rd178];
	// end inline asm
	add.s64 	%rd179, %rd176, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r409,%r410,%r411,%r412}, [%rd179];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r413, %r408, %r409, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r417, %r409, %r410, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r421, %r410, %r411, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r425, %r411, %r412, %r7;
	// end inline asm
	st.v4.u32 	[%rd185+512], {%r413, %r417, %r421, %r425};
	add.s64 	%rd180, %rd176, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r429,%r430,%r431,%r432}, [%rd180];
	// end inline asm
	add.s64 	%rd181, %rd176, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r433,%r434,%r435,%r436}, [%rd181];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r437, %r432, %r433, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r441, %r433, %r434, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r445, %r434, %r435, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r449, %r435, %r436, %r7;
	// end inline asm
	st.v4.u32 	[%rd185+1024], {%r437, %r441, %r445, %r449};
	add.s64 	%rd182, %rd176, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r453,%r454,%r455,%r456}, [%rd182];
	// end inline asm
	add.s64 	%rd183, %rd176, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r457,%r458,%r459,%r460}, [%rd183];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r461, %r456, %r457, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r465, %r457, %r458, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r469, %r458, %r459, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r473, %r459, %r460, %r7;
	// end inline asm
	st.v4.u32 	[%rd185+1536], {%r461, %r465, %r469, %r473};
	add.s64 	%rd398, %rd398, 128;
	setp.lt.u64 	%p17, %rd398, %rd17;
	@%p17 bra 	$L__BB0_20;
$L__BB0_67:
	cvt.u32.u64 	%r1907, %rd16;
	and.b32  	%r1908, %r1907, 15;
	setp.le.u32 	%p56, %r1908, %r11;
	@%p56 bra 	$L__BB0_69;
	neg.s64 	%rd380, %rd392;
	and.b64  	%rd379, %rd380, 15;
	min.u64 	%rd378, %rd379, %rd391;
	add.s64 	%rd364, %rd378, %rd4;
	and.b64  	%rd365, %rd16, -16;
	add.s64 	%rd366, %rd364, %rd365;
	add.s64 	%rd367, %rd393, %rd366;
	ld.u8 	%rs2, [%rd367];
	add.s64 	%rd368, %rd392, %rd366;
	st.u8 	[%rd368], %rs2;
$L__BB0_69:
	mov.u32 	%r1919, %ntid.x;
	mov.u32 	%r1918, %nctaid.x;
	shr.u32 	%r1917, %r1919, 5;
	mul.lo.s32 	%r1916, %r1917, %r1918;
	add.s32 	%r1927, %r1927, %r1916;
	ld.param.u32 	%r1914, [railwire_copy_param_1];
	setp.lt.u32 	%p60, %r1927, %r1914;
	mov.u64 	%rd391, %rd12;
	mov.u64 	%rd392, %rd11;
	mov.u64 	%rd393, %rd10;
	@%p60 bra 	$L__BB0_2;
$L__BB0_70:
	mov.u32 	%r1920, %tid.x;
	membar.sys;
	bar.sync 	0;
	setp.ne.s32 	%p58, %r1920, 0;
	@%p58 bra 	$L__BB0_73;
	ld.param.u64 	%rd372, [railwire_copy_param_2];
	mov.u32 	%r1921, %nctaid.x;
	cvta.to.global.u64 	%rd369, %rd372;
	atom.global.add.u32 	%r1910, [%rd369], 1;
	add.s32 	%r1912, %r1921, -1;
	setp.ne.s32 	%p59, %r1910, %r1912;
	@%p59 bra 	$L__BB0_73;
	ld.param.u64 	%rd374, [railwire_copy_param_4];
	ld.param.u64 	%rd373, [railwire_copy_param_3];
	mov.u32 	%r1913, 0;
	st.global.u32 	[%rd369], %r1913;
	membar.sys;
	cvta.to.global.u64 	%rd371, %rd373;
	st.volatile.global.u64 	[%rd371], %rd374;
$L__BB0_73:
	ret;
}
	// .globl	railwire_copy_few
.visible .entry railwire_copy_few(
	.param .align 8 .b8 railwire_copy_few_param_0[3072],
	.param .u32 railwire_copy_few_param_1,
	.param .u64 railwire_copy_few_param_2,
	.param .u64 railwire_copy_few_param_3,
	.param .u64 railwire_copy_few_param_4
)
.maxntid 512, 1, 1
{
	.reg .pred 	%p<61>;
	.reg .b16 	%rs<3>;
	.reg .b32 	%r<1926>;
	.reg .b64 	%rd<412>;
	mov.b64 	%rd119, railwire_copy_few_param_0;
	ld.param.u32 	%r8, [railwire_copy_few_param_1];
	mov.u32 	%r1, %nctaid.x;
	mov.u32 	%r9, %tid.x;
	and.b32  	%r2, %r9, 31;
	shr.u32 	%r10, %r9, 5;
	mov.u32 	%r11, %ctaid.x;
	mad.lo.s32 	%r1925, %r10, %r1, %r11;
	setp.ge.u32 	%p1, %r1925, %r8;
	@%p1 bra 	$L__BB1_70;
	mul.wide.u32 	%rd120, %r1925, 24;
	add.s64 	%rd121, %rd119, %rd120;
	ld.param.u64 	%rd386, [%rd121];
	ld.param.u64 	%rd385, [%rd121+8];
	ld.param.u64 	%rd384, [%rd121+16];
	cvt.u64.u32 	%rd5, %r2;
	or.b64  	%rd6, %rd5, 96;
	mov.u64 	%rd122, -97;
	sub.s64 	%rd7, %rd122, %rd5;
	or.b64  	%rd8, %rd5, 128;
$L__BB1_2:
	mov.u32 	%r1924, %ntid.x;
	mov.u32 	%r1923, %nctaid.x;
	shr.u32 	%r1922, %r1924, 5;
	mul.lo.s32 	%r1921, %r1922, %r1923;
	ld.param.u32 	%r1920, [railwire_copy_few_param_1];
	add.s32 	%r6, %r1925, %r1921;
	setp.lt.u32 	%p2, %r6, %r1920;
	selp.b32 	%r14, %r6, %r1925, %p2;
	mul.wide.u32 	%rd123, %r14, 24;
	neg.s64 	%rd125, %rd385;
	and.b64  	%rd15, %rd125, 15;
	min.u64 	%rd16, %rd15, %rd384;
	setp.le.u64 	%p3, %rd16, %rd5;
	@%p3 bra 	$L__BB1_4;
	add.s64 	%rd126, %rd386, %rd5;
	ld.u8 	%rs1, [%rd126];
	add.s64 	%rd127, %rd385, %rd5;
	st.u8 	[%rd127], %rs1;
$L__BB1_4:
	neg.s64 	%rd379, %rd385;
	and.b64  	%rd378, %rd379, 15;
	min.u64 	%rd377, %rd378, %rd384;
	add.s64 	%rd128, %rd386, %rd377;
	add.s64 	%rd17, %rd385, %rd377;
	sub.s64 	%rd18, %rd384, %rd377;
	shr.u64 	%rd19, %rd18, 4;
	cvt.u32.u64 	%r15, %rd128;
	and.b32  	%r16, %r15, 15;
	and.b64  	%rd20, %rd128, 15;
	sub.s64 	%rd129, %rd377, %rd20;
	add.s64 	%rd21, %rd386, %rd129;
	shl.b32 	%r17, %r15, 3;
	and.b32  	%r7, %r17, 24;
	setp.eq.s32 	%p4, %r16, 0;
	@%p4 bra 	$L__BB1_57;
	cvt.u32.u64 	%r18, %rd20;
	setp.lt.u32 	%p5, %r18, 4;
	shl.b64 	%rd130, %rd5, 4;
	add.s64 	%rd22, %rd17, %rd130;
	@%p5 bra 	$L__BB1_45;
	bra.uni 	$L__BB1_6;
$L__BB1_45:
	setp.ge.u64 	%p38, %rd6, %rd19;
	mov.u64 	%rd405, %rd5;
	@%p38 bra 	$L__BB1_50;
	add.s64 	%rd88, %rd7, %rd19;
	and.b64  	%rd285, %rd88, 128;
	setp.ne.s64 	%p39, %rd285, 0;
	mov.u64 	%rd404, %rd5;
	@%p39 bra 	$L__BB1_48;
	add.s64 	%rd286, %rd21, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1389,%r1390,%r1391,%r1392}, [%rd286];
	// end inline asm
	add.s64 	%rd287, %rd286, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1393,%r1394,%r1395,%r1396}, [%rd287];
	// end inline asm
	add.s64 	%rd288, %rd286, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1397,%r1398,%r1399,%r1400}, [%rd288];
	// end inline asm
	add.s64 	%rd289, %rd286, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1401,%r1402,%r1403,%r1404}, [%rd289];
	// end inline asm
	add.s64 	%rd290, %rd286, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1405,%r1406,%r1407,%r1408}, [%rd290];
	// end inline asm
	add.s64 	%rd291, %rd286, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1409,%r1410,%r1411,%r1412}, [%rd291];
	// end inline asm
	add.s64 	%rd292, %rd286, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1413,%r1414,%r1415,%r1416}, [%rd292];
	// end inline asm
	add.s64 	%rd293, %rd286, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1417,%r1418,%r1419,%r1420}, [%rd293];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1421, %r1389, %r1390, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1425, %r1390, %r1391, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1429, %r1391, %r1392, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1433, %r1392, %r1405, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1437, %r1393, %r1394, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1441, %r1394, %r1395, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1445, %r1395, %r1396, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1449, %r1396, %r1409, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1453, %r1397, %r1398, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1457, %r1398, %r1399, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1461, %r1399, %r1400, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1465, %r1400, %r1413, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1469, %r1401, %r1402, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1473, %r1402, %r1403, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1477, %r1403, %r1404, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1481, %r1404, %r1417, %r7;
	// end inline asm
	st.v4.u32 	[%rd22], {%r1421, %r1425, %r1429, %r1433};
	st.v4.u32 	[%rd22+512], {%r1437, %r1441, %r1445, %r1449};
	st.v4.u32 	[%rd22+1024], {%r1453, %r1457, %r1461, %r1465};
	st.v4.u32 	[%rd22+1536], {%r1469, %r1473, %r1477, %r1481};
	mov.u64 	%rd404, %rd8;
$L__BB1_48:
	and.b64  	%rd295, %rd88, -128;
	setp.eq.s64 	%p40, %rd295, 0;
	mov.u64 	%rd405, %rd8;
	@%p40 bra 	$L__BB1_50;
$L__BB1_49:
	shl.b64 	%rd312, %rd404, 4;
	add.s64 	%rd296, %rd21, %rd312;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1485,%r1486,%r1487,%r1488}, [%rd296];
	// end inline asm
	add.s64 	%rd297, %rd296, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1489,%r1490,%r1491,%r1492}, [%rd297];
	// end inline asm
	add.s64 	%rd298, %rd296, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1493,%r1494,%r1495,%r1496}, [%rd298];
	// end inline asm
	add.s64 	%rd299, %rd296, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1497,%r1498,%r1499,%r1500}, [%rd299];
	// end inline asm
	add.s64 	%rd300, %rd296, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1501,%r1502,%r1503,%r1504}, [%rd300];
	// end inline asm
	add.s64 	%rd301, %rd296, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1505,%r1506,%r1507,%r1508}, [%rd301];
	// end inline asm
	add.s64 	%rd302, %rd296, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1509,%r1510,%r1511,%r1512}, [%rd302];
	// end inline asm
	add.s64 	%rd303, %rd296, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1513,%r1514,%r1515,%r1516}, [%rd303];
	// end inline asm
	add.s64 	%rd313, %rd17, %rd312;
	// begin inline asm
	shf.r.wrap.b32 %r1517, %r1485, %r1486, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1521, %r1486, %r1487, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1525, %r1487, %r1488, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1529, %r1488, %r1501, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1533, %r1489, %r1490, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1537, %r1490, %r1491, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1541, %r1491, %r1492, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1545, %r1492, %r1505, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1549, %r1493, %r1494, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1553, %r1494, %r1495, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1557, %r1495, %r1496, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1561, %r1496, %r1509, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1565, %r1497, %r1498, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1569, %r1498, %r1499, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1573, %r1499, %r1500, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1577, %r1500, %r1513, %r7;
	// end inline asm
	st.v4.u32 	[%rd313], {%r1517, %r1521, %r1525, %r1529};
	st.v4.u32 	[%rd313+512], {%r1533, %r1537, %r1541, %r1545};
	st.v4.u32 	[%rd313+1024], {%r1549, %r1553, %r1557, %r1561};
	st.v4.u32 	[%rd313+1536], {%r1565, %r1569, %r1573, %r1577};
	add.s64 	%rd304, %rd296, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1581,%r1582,%r1583,%r1584}, [%rd304];
	// end inline asm
	add.s64 	%rd305, %rd296, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1585,%r1586,%r1587,%r1588}, [%rd305];
	// end inline asm
	add.s64 	%rd306, %rd296, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1589,%r1590,%r1591,%r1592}, [%rd306];
	// end inline asm
	add.s64 	%rd307, %rd296, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1593,%r1594,%r1595,%r1596}, [%rd307];
	// end inline asm
	add.s64 	%rd308, %rd296, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1597,%r1598,%r1599,%r1600}, [%rd308];
	// end inline asm
	add.s64 	%rd309, %rd296, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1601,%r1602,%r1603,%r1604}, [%rd309];
	// end inline asm
	add.s64 	%rd310, %rd296, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1605,%r1606,%r1607,%r1608}, [%rd310];
	// end inline asm
	add.s64 	%rd311, %rd296, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1609,%r1610,%r1611,%r1612}, [%rd311];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1613, %r1581, %r1582, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1617, %r1582, %r1583, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1621, %r1583, %r1584, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1625, %r1584, %r1597, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1629, %r1585, %r1586, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1633, %r1586, %r1587, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1637, %r1587, %r1588, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1641, %r1588, %r1601, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1645, %r1589, %r1590, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1649, %r1590, %r1591, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1653, %r1591, %r1592, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1657, %r1592, %r1605, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1661, %r1593, %r1594, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1665, %r1594, %r1595, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1669, %r1595, %r1596, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1673, %r1596, %r1609, %r7;
	// end inline asm
	st.v4.u32 	[%rd313+2048], {%r1613, %r1617, %r1621, %r1625};
	st.v4.u32 	[%rd313+2560], {%r1629, %r1633, %r1637, %r1641};
	st.v4.u32 	[%rd313+3072], {%r1645, %r1649, %r1653, %r1657};
	st.v4.u32 	[%rd313+3584], {%r1661, %r1665, %r1669, %r1673};
	add.s64 	%rd405, %rd404, 256;
	add.s64 	%rd314, %rd404, 352;
	setp.lt.u64 	%p41, %rd314, %rd19;
	mov.u64 	%rd404, %rd405;
	@%p41 bra 	$L__BB1_49;
$L__BB1_50:
	setp.ge.u64 	%p42, %rd405, %rd19;
	@%p42 bra 	$L__BB1_67;
	not.b64 	%rd315, %rd405;
	add.s64 	%rd93, %rd19, %rd315;
	shr.u64 	%rd316, %rd93, 5;
	add.s64 	%rd317, %rd316, 1;
	and.b64  	%rd94, %rd317, 3;
	setp.eq.s64 	%p43, %rd94, 0;
	mov.u64 	%rd406, %rd405;
	@%p43 bra 	$L__BB1_55;
	shl.b64 	%rd320, %rd405, 4;
	add.s64 	%rd318, %rd21, %rd320;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1677,%r1678,%r1679,%r1680}, [%rd318];
	// end inline asm
	add.s64 	%rd319, %rd318, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1681,%r1682,%r1683,%r1684}, [%rd319];
	// end inline asm
	add.s64 	%rd96, %rd17, %rd320;
	// begin inline asm
	shf.r.wrap.b32 %r1685, %r1677, %r1678, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1689, %r1678, %r1679, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1693, %r1679, %r1680, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1697, %r1680, %r1681, %r7;
	// end inline asm
	st.v4.u32 	[%rd96], {%r1685, %r1689, %r1693, %r1697};
	add.s64 	%rd406, %rd405, 32;
	setp.eq.s64 	%p44, %rd94, 1;
	@%p44 bra 	$L__BB1_55;
	add.s64 	%rd321, %rd318, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1701,%r1702,%r1703,%r1704}, [%rd321];
	// end inline asm
	add.s64 	%rd322, %rd318, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1705,%r1706,%r1707,%r1708}, [%rd322];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1709, %r1701, %r1702, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1713, %r1702, %r1703, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1717, %r1703, %r1704, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1721, %r1704, %r1705, %r7;
	// end inline asm
	st.v4.u32 	[%rd96+512], {%r1709, %r1713, %r1717, %r1721};
	add.s64 	%rd406, %rd405, 64;
	setp.eq.s64 	%p45, %rd94, 2;
	@%p45 bra 	$L__BB1_55;
	add.s64 	%rd323, %rd318, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1725,%r1726,%r1727,%r1728}, [%rd323];
	// end inline asm
	add.s64 	%rd324, %rd318, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1729,%r1730,%r1731,%r1732}, [%rd324];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1733, %r1725, %r1726, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1737, %r1726, %r1727, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1741, %r1727, %r1728, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1745, %r1728, %r1729, %r7;
	// end inline asm
	st.v4.u32 	[%rd96+1024], {%r1733, %r1737, %r1741, %r1745};
	add.s64 	%rd406, %rd405, 96;
$L__BB1_55:
	setp.lt.u64 	%p46, %rd93, 96;
	@%p46 bra 	$L__BB1_67;
$L__BB1_56:
	shl.b64 	%rd333, %rd406, 4;
	add.s64 	%rd325, %rd21, %rd333;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1749,%r1750,%r1751,%r1752}, [%rd325];
	// end inline asm
	add.s64 	%rd326, %rd325, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1753,%r1754,%r1755,%r1756}, [%rd326];
	// end inline asm
	add.s64 	%rd334, %rd17, %rd333;
	// begin inline asm
	shf.r.wrap.b32 %r1757, %r1749, %r1750, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1761, %r1750, %r1751, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1765, %r1751, %r1752, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1769, %r1752, %r1753, %r7;
	// end inline asm
	st.v4.u32 	[%rd334], {%r1757, %r1761, %r1765, %r1769};
	add.s64 	%rd327, %rd325, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1773,%r1774,%r1775,%r1776}, [%rd327];
	// end inline asm
	add.s64 	%rd328, %rd325, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1777,%r1778,%r1779,%r1780}, [%rd328];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1781, %r1773, %r1774, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1785, %r1774, %r1775, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1789, %r1775, %r1776, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1793, %r1776, %r1777, %r7;
	// end inline asm
	st.v4.u32 	[%rd334+512], {%r1781, %r1785, %r1789, %r1793};
	add.s64 	%rd329, %rd325, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1797,%r1798,%r1799,%r1800}, [%rd329];
	// end inline asm
	add.s64 	%rd330, %rd325, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1801,%r1802,%r1803,%r1804}, [%rd330];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1805, %r1797, %r1798, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1809, %r1798, %r1799, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1813, %r1799, %r1800, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1817, %r1800, %r1801, %r7;
	// end inline asm
	st.v4.u32 	[%rd334+1024], {%r1805, %r1809, %r1813, %r1817};
	add.s64 	%rd331, %rd325, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1821,%r1822,%r1823,%r1824}, [%rd331];
	// end inline asm
	add.s64 	%rd332, %rd325, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1825,%r1826,%r1827,%r1828}, [%rd332];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1829, %r1821, %r1822, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1833, %r1822, %r1823, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1837, %r1823, %r1824, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1841, %r1824, %r1825, %r7;
	// end inline asm
	st.v4.u32 	[%rd334+1536], {%r1829, %r1833, %r1837, %r1841};
	add.s64 	%rd406, %rd406, 128;
	setp.lt.u64 	%p47, %rd406, %rd19;
	@%p47 bra 	$L__BB1_56;
	bra.uni 	$L__BB1_67;
$L__BB1_57:
	or.b64  	%rd335, %rd5, 224;
	setp.ge.u64 	%p48, %rd335, %rd19;
	mov.u64 	%rd409, %rd5;
	@%p48 bra 	$L__BB1_60;
	mov.u64 	%rd408, %rd5;
$L__BB1_59:
	shl.b64 	%rd344, %rd408, 4;
	add.s64 	%rd336, %rd21, %rd344;
	add.s64 	%rd337, %rd336, 512;
	add.s64 	%rd338, %rd336, 1024;
	add.s64 	%rd339, %rd336, 1536;
	add.s64 	%rd340, %rd336, 2048;
	add.s64 	%rd341, %rd336, 2560;
	add.s64 	%rd342, %rd336, 3072;
	add.s64 	%rd343, %rd336, 3584;
	add.s64 	%rd345, %rd17, %rd344;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1845,%r1846,%r1847,%r1848}, [%rd336];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1849,%r1850,%r1851,%r1852}, [%rd337];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1853,%r1854,%r1855,%r1856}, [%rd338];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1857,%r1858,%r1859,%r1860}, [%rd339];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1861,%r1862,%r1863,%r1864}, [%rd340];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1865,%r1866,%r1867,%r1868}, [%rd341];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1869,%r1870,%r1871,%r1872}, [%rd342];
	// end inline asm
	// begin inline asm
	ld.global.cs.v4.u32 {%r1873,%r1874,%r1875,%r1876}, [%rd343];
	// end inline asm
	st.v4.u32 	[%rd345], {%r1845, %r1846, %r1847, %r1848};
	st.v4.u32 	[%rd345+512], {%r1849, %r1850, %r1851, %r1852};
	st.v4.u32 	[%rd345+1024], {%r1853, %r1854, %r1855, %r1856};
	st.v4.u32 	[%rd345+1536], {%r1857, %r1858, %r1859, %r1860};
	st.v4.u32 	[%rd345+2048], {%r1861, %r1862, %r1863, %r1864};
	st.v4.u32 	[%rd345+2560], {%r1865, %r1866, %r1867, %r1868};
	st.v4.u32 	[%rd345+3072], {%r1869, %r1870, %r1871, %r1872};
	st.v4.u32 	[%rd345+3584], {%r1873, %r1874, %r1875, %r1876};
	add.s64 	%rd409, %rd408, 256;
	add.s64 	%rd346, %rd408, 480;
	setp.lt.u64 	%p49, %rd346, %rd19;
	mov.u64 	%rd408, %rd409;
	@%p49 bra 	$L__BB1_59;
$L__BB1_60:
	setp.ge.u64 	%p50, %rd409, %rd19;
	@%p50 bra 	$L__BB1_67;
	not.b64 	%rd347, %rd409;
	add.s64 	%rd106, %rd19, %rd347;
	shr.u64 	%rd348, %rd106, 5;
	add.s64 	%rd349, %rd348, 1;
	and.b64  	%rd107, %rd349, 3;
	setp.eq.s64 	%p51, %rd107, 0;
	mov.u64 	%rd410, %rd409;
	@%p51 bra 	$L__BB1_65;
	shl.b64 	%rd351, %rd409, 4;
	add.s64 	%rd350, %rd21, %rd351;
	add.s64 	%rd109, %rd17, %rd351;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1877,%r1878,%r1879,%r1880}, [%rd350];
	// end inline asm
	st.v4.u32 	[%rd109], {%r1877, %r1878, %r1879, %r1880};
	add.s64 	%rd410, %rd409, 32;
	setp.eq.s64 	%p52, %rd107, 1;
	@%p52 bra 	$L__BB1_65;
	add.s64 	%rd352, %rd350, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1881,%r1882,%r1883,%r1884}, [%rd352];
	// end inline asm
	st.v4.u32 	[%rd109+512], {%r1881, %r1882, %r1883, %r1884};
	add.s64 	%rd410, %rd409, 64;
	setp.eq.s64 	%p53, %rd107, 2;
	@%p53 bra 	$L__BB1_65;
	add.s64 	%rd353, %rd350, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1885,%r1886,%r1887,%r1888}, [%rd353];
	// end inline asm
	st.v4.u32 	[%rd109+1024], {%r1885, %r1886, %r1887, %r1888};
	add.s64 	%rd410, %rd409, 96;
$L__BB1_65:
	setp.lt.u64 	%p54, %rd106, 96;
	@%p54 bra 	$L__BB1_67;
$L__BB1_66:
	shl.b64 	%rd358, %rd410, 4;
	add.s64 	%rd354, %rd21, %rd358;
	add.s64 	%rd359, %rd17, %rd358;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1889,%r1890,%r1891,%r1892}, [%rd354];
	// end inline asm
	st.v4.u32 	[%rd359], {%r1889, %r1890, %r1891, %r1892};
	add.s64 	%rd355, %rd354, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1893,%r1894,%r1895,%r1896}, [%rd355];
	// end inline asm
	st.v4.u32 	[%rd359+512], {%r1893, %r1894, %r1895, %r1896};
	add.s64 	%rd356, %rd354, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1897,%r1898,%r1899,%r1900}, [%rd356];
	// end inline asm
	st.v4.u32 	[%rd359+1024], {%r1897, %r1898, %r1899, %r1900};
	add.s64 	%rd357, %rd354, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1901,%r1902,%r1903,%r1904}, [%rd357];
	// end inline asm
	st.v4.u32 	[%rd359+1536], {%r1901, %r1902, %r1903, %r1904};
	add.s64 	%rd410, %rd410, 128;
	setp.lt.u64 	%p55, %rd410, %rd19;
	@%p55 bra 	$L__BB1_66;
	bra.uni 	$L__BB1_67;
$L__BB1_6:
	setp.lt.u32 	%p6, %r18, 8;
	@%p6 bra 	$L__BB1_33;
	bra.uni 	$L__BB1_7;
$L__BB1_33:
	setp.ge.u64 	%p28, %rd6, %rd19;
	mov.u64 	%rd400, %rd5;
	@%p28 bra 	$L__BB1_38;
	add.s64 	%rd73, %rd7, %rd19;
	and.b64  	%rd235, %rd73, 128;
	setp.ne.s64 	%p29, %rd235, 0;
	mov.u64 	%rd399, %rd5;
	@%p29 bra 	$L__BB1_36;
	add.s64 	%rd236, %rd21, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r933,%r934,%r935,%r936}, [%rd236];
	// end inline asm
	add.s64 	%rd237, %rd236, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r937,%r938,%r939,%r940}, [%rd237];
	// end inline asm
	add.s64 	%rd238, %rd236, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r941,%r942,%r943,%r944}, [%rd238];
	// end inline asm
	add.s64 	%rd239, %rd236, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r945,%r946,%r947,%r948}, [%rd239];
	// end inline asm
	add.s64 	%rd240, %rd236, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r949,%r950,%r951,%r952}, [%rd240];
	// end inline asm
	add.s64 	%rd241, %rd236, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r953,%r954,%r955,%r956}, [%rd241];
	// end inline asm
	add.s64 	%rd242, %rd236, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r957,%r958,%r959,%r960}, [%rd242];
	// end inline asm
	add.s64 	%rd243, %rd236, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r961,%r962,%r963,%r964}, [%rd243];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r965, %r934, %r935, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r969, %r935, %r936, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r973, %r936, %r949, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r977, %r949, %r950, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r981, %r938, %r939, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r985, %r939, %r940, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r989, %r940, %r953, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r993, %r953, %r954, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r997, %r942, %r943, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1001, %r943, %r944, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1005, %r944, %r957, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1009, %r957, %r958, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1013, %r946, %r947, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1017, %r947, %r948, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1021, %r948, %r961, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1025, %r961, %r962, %r7;
	// end inline asm
	st.v4.u32 	[%rd22], {%r965, %r969, %r973, %r977};
	st.v4.u32 	[%rd22+512], {%r981, %r985, %r989, %r993};
	st.v4.u32 	[%rd22+1024], {%r997, %r1001, %r1005, %r1009};
	st.v4.u32 	[%rd22+1536], {%r1013, %r1017, %r1021, %r1025};
	mov.u64 	%rd399, %rd8;
$L__BB1_36:
	and.b64  	%rd245, %rd73, -128;
	setp.eq.s64 	%p30, %rd245, 0;
	mov.u64 	%rd400, %rd8;
	@%p30 bra 	$L__BB1_38;
$L__BB1_37:
	shl.b64 	%rd262, %rd399, 4;
	add.s64 	%rd246, %rd21, %rd262;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1029,%r1030,%r1031,%r1032}, [%rd246];
	// end inline asm
	add.s64 	%rd247, %rd246, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1033,%r1034,%r1035,%r1036}, [%rd247];
	// end inline asm
	add.s64 	%rd248, %rd246, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1037,%r1038,%r1039,%r1040}, [%rd248];
	// end inline asm
	add.s64 	%rd249, %rd246, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1041,%r1042,%r1043,%r1044}, [%rd249];
	// end inline asm
	add.s64 	%rd250, %rd246, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1045,%r1046,%r1047,%r1048}, [%rd250];
	// end inline asm
	add.s64 	%rd251, %rd246, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1049,%r1050,%r1051,%r1052}, [%rd251];
	// end inline asm
	add.s64 	%rd252, %rd246, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1053,%r1054,%r1055,%r1056}, [%rd252];
	// end inline asm
	add.s64 	%rd253, %rd246, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1057,%r1058,%r1059,%r1060}, [%rd253];
	// end inline asm
	add.s64 	%rd263, %rd17, %rd262;
	// begin inline asm
	shf.r.wrap.b32 %r1061, %r1030, %r1031, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1065, %r1031, %r1032, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1069, %r1032, %r1045, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1073, %r1045, %r1046, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1077, %r1034, %r1035, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1081, %r1035, %r1036, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1085, %r1036, %r1049, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1089, %r1049, %r1050, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1093, %r1038, %r1039, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1097, %r1039, %r1040, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1101, %r1040, %r1053, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1105, %r1053, %r1054, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1109, %r1042, %r1043, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1113, %r1043, %r1044, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1117, %r1044, %r1057, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1121, %r1057, %r1058, %r7;
	// end inline asm
	st.v4.u32 	[%rd263], {%r1061, %r1065, %r1069, %r1073};
	st.v4.u32 	[%rd263+512], {%r1077, %r1081, %r1085, %r1089};
	st.v4.u32 	[%rd263+1024], {%r1093, %r1097, %r1101, %r1105};
	st.v4.u32 	[%rd263+1536], {%r1109, %r1113, %r1117, %r1121};
	add.s64 	%rd254, %rd246, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1125,%r1126,%r1127,%r1128}, [%rd254];
	// end inline asm
	add.s64 	%rd255, %rd246, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1129,%r1130,%r1131,%r1132}, [%rd255];
	// end inline asm
	add.s64 	%rd256, %rd246, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1133,%r1134,%r1135,%r1136}, [%rd256];
	// end inline asm
	add.s64 	%rd257, %rd246, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1137,%r1138,%r1139,%r1140}, [%rd257];
	// end inline asm
	add.s64 	%rd258, %rd246, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1141,%r1142,%r1143,%r1144}, [%rd258];
	// end inline asm
	add.s64 	%rd259, %rd246, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1145,%r1146,%r1147,%r1148}, [%rd259];
	// end inline asm
	add.s64 	%rd260, %rd246, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1149,%r1150,%r1151,%r1152}, [%rd260];
	// end inline asm
	add.s64 	%rd261, %rd246, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1153,%r1154,%r1155,%r1156}, [%rd261];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1157, %r1126, %r1127, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1161, %r1127, %r1128, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1165, %r1128, %r1141, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1169, %r1141, %r1142, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1173, %r1130, %r1131, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1177, %r1131, %r1132, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1181, %r1132, %r1145, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1185, %r1145, %r1146, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1189, %r1134, %r1135, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1193, %r1135, %r1136, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1197, %r1136, %r1149, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1201, %r1149, %r1150, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1205, %r1138, %r1139, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1209, %r1139, %r1140, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1213, %r1140, %r1153, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1217, %r1153, %r1154, %r7;
	// end inline asm
	st.v4.u32 	[%rd263+2048], {%r1157, %r1161, %r1165, %r1169};
	st.v4.u32 	[%rd263+2560], {%r1173, %r1177, %r1181, %r1185};
	st.v4.u32 	[%rd263+3072], {%r1189, %r1193, %r1197, %r1201};
	st.v4.u32 	[%rd263+3584], {%r1205, %r1209, %r1213, %r1217};
	add.s64 	%rd400, %rd399, 256;
	add.s64 	%rd264, %rd399, 352;
	setp.lt.u64 	%p31, %rd264, %rd19;
	mov.u64 	%rd399, %rd400;
	@%p31 bra 	$L__BB1_37;
$L__BB1_38:
	setp.ge.u64 	%p32, %rd400, %rd19;
	@%p32 bra 	$L__BB1_67;
	not.b64 	%rd265, %rd400;
	add.s64 	%rd78, %rd19, %rd265;
	shr.u64 	%rd266, %rd78, 5;
	add.s64 	%rd267, %rd266, 1;
	and.b64  	%rd79, %rd267, 3;
	setp.eq.s64 	%p33, %rd79, 0;
	mov.u64 	%rd401, %rd400;
	@%p33 bra 	$L__BB1_43;
	shl.b64 	%rd270, %rd400, 4;
	add.s64 	%rd268, %rd21, %rd270;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1221,%r1222,%r1223,%r1224}, [%rd268];
	// end inline asm
	add.s64 	%rd269, %rd268, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1225,%r1226,%r1227,%r1228}, [%rd269];
	// end inline asm
	add.s64 	%rd81, %rd17, %rd270;
	// begin inline asm
	shf.r.wrap.b32 %r1229, %r1222, %r1223, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1233, %r1223, %r1224, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1237, %r1224, %r1225, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1241, %r1225, %r1226, %r7;
	// end inline asm
	st.v4.u32 	[%rd81], {%r1229, %r1233, %r1237, %r1241};
	add.s64 	%rd401, %rd400, 32;
	setp.eq.s64 	%p34, %rd79, 1;
	@%p34 bra 	$L__BB1_43;
	add.s64 	%rd271, %rd268, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1245,%r1246,%r1247,%r1248}, [%rd271];
	// end inline asm
	add.s64 	%rd272, %rd268, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1249,%r1250,%r1251,%r1252}, [%rd272];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1253, %r1246, %r1247, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1257, %r1247, %r1248, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1261, %r1248, %r1249, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1265, %r1249, %r1250, %r7;
	// end inline asm
	st.v4.u32 	[%rd81+512], {%r1253, %r1257, %r1261, %r1265};
	add.s64 	%rd401, %rd400, 64;
	setp.eq.s64 	%p35, %rd79, 2;
	@%p35 bra 	$L__BB1_43;
	add.s64 	%rd273, %rd268, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1269,%r1270,%r1271,%r1272}, [%rd273];
	// end inline asm
	add.s64 	%rd274, %rd268, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1273,%r1274,%r1275,%r1276}, [%rd274];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1277, %r1270, %r1271, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1281, %r1271, %r1272, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1285, %r1272, %r1273, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1289, %r1273, %r1274, %r7;
	// end inline asm
	st.v4.u32 	[%rd81+1024], {%r1277, %r1281, %r1285, %r1289};
	add.s64 	%rd401, %rd400, 96;
$L__BB1_43:
	setp.lt.u64 	%p36, %rd78, 96;
	@%p36 bra 	$L__BB1_67;
$L__BB1_44:
	shl.b64 	%rd283, %rd401, 4;
	add.s64 	%rd275, %rd21, %rd283;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1293,%r1294,%r1295,%r1296}, [%rd275];
	// end inline asm
	add.s64 	%rd276, %rd275, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1297,%r1298,%r1299,%r1300}, [%rd276];
	// end inline asm
	add.s64 	%rd284, %rd17, %rd283;
	// begin inline asm
	shf.r.wrap.b32 %r1301, %r1294, %r1295, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1305, %r1295, %r1296, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1309, %r1296, %r1297, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1313, %r1297, %r1298, %r7;
	// end inline asm
	st.v4.u32 	[%rd284], {%r1301, %r1305, %r1309, %r1313};
	add.s64 	%rd277, %rd275, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1317,%r1318,%r1319,%r1320}, [%rd277];
	// end inline asm
	add.s64 	%rd278, %rd275, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1321,%r1322,%r1323,%r1324}, [%rd278];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1325, %r1318, %r1319, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1329, %r1319, %r1320, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1333, %r1320, %r1321, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1337, %r1321, %r1322, %r7;
	// end inline asm
	st.v4.u32 	[%rd284+512], {%r1325, %r1329, %r1333, %r1337};
	add.s64 	%rd279, %rd275, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1341,%r1342,%r1343,%r1344}, [%rd279];
	// end inline asm
	add.s64 	%rd280, %rd275, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1345,%r1346,%r1347,%r1348}, [%rd280];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1349, %r1342, %r1343, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1353, %r1343, %r1344, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1357, %r1344, %r1345, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1361, %r1345, %r1346, %r7;
	// end inline asm
	st.v4.u32 	[%rd284+1024], {%r1349, %r1353, %r1357, %r1361};
	add.s64 	%rd281, %rd275, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1365,%r1366,%r1367,%r1368}, [%rd281];
	// end inline asm
	add.s64 	%rd282, %rd275, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r1369,%r1370,%r1371,%r1372}, [%rd282];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1373, %r1366, %r1367, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1377, %r1367, %r1368, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1381, %r1368, %r1369, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r1385, %r1369, %r1370, %r7;
	// end inline asm
	st.v4.u32 	[%rd284+1536], {%r1373, %r1377, %r1381, %r1385};
	add.s64 	%rd401, %rd401, 128;
	setp.lt.u64 	%p37, %rd401, %rd19;
	@%p37 bra 	$L__BB1_44;
	bra.uni 	$L__BB1_67;
$L__BB1_7:
	setp.lt.u32 	%p7, %r18, 12;
	@%p7 bra 	$L__BB1_21;
	bra.uni 	$L__BB1_8;
$L__BB1_21:
	setp.ge.u64 	%p18, %rd6, %rd19;
	mov.u64 	%rd395, %rd5;
	@%p18 bra 	$L__BB1_26;
	add.s64 	%rd58, %rd7, %rd19;
	and.b64  	%rd185, %rd58, 128;
	setp.ne.s64 	%p19, %rd185, 0;
	mov.u64 	%rd394, %rd5;
	@%p19 bra 	$L__BB1_24;
	add.s64 	%rd186, %rd21, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r477,%r478,%r479,%r480}, [%rd186];
	// end inline asm
	add.s64 	%rd187, %rd186, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r481,%r482,%r483,%r484}, [%rd187];
	// end inline asm
	add.s64 	%rd188, %rd186, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r485,%r486,%r487,%r488}, [%rd188];
	// end inline asm
	add.s64 	%rd189, %rd186, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r489,%r490,%r491,%r492}, [%rd189];
	// end inline asm
	add.s64 	%rd190, %rd186, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r493,%r494,%r495,%r496}, [%rd190];
	// end inline asm
	add.s64 	%rd191, %rd186, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r497,%r498,%r499,%r500}, [%rd191];
	// end inline asm
	add.s64 	%rd192, %rd186, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r501,%r502,%r503,%r504}, [%rd192];
	// end inline asm
	add.s64 	%rd193, %rd186, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r505,%r506,%r507,%r508}, [%rd193];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r509, %r479, %r480, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r513, %r480, %r493, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r517, %r493, %r494, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r521, %r494, %r495, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r525, %r483, %r484, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r529, %r484, %r497, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r533, %r497, %r498, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r537, %r498, %r499, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r541, %r487, %r488, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r545, %r488, %r501, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r549, %r501, %r502, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r553, %r502, %r503, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r557, %r491, %r492, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r561, %r492, %r505, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r565, %r505, %r506, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r569, %r506, %r507, %r7;
	// end inline asm
	st.v4.u32 	[%rd22], {%r509, %r513, %r517, %r521};
	st.v4.u32 	[%rd22+512], {%r525, %r529, %r533, %r537};
	st.v4.u32 	[%rd22+1024], {%r541, %r545, %r549, %r553};
	st.v4.u32 	[%rd22+1536], {%r557, %r561, %r565, %r569};
	mov.u64 	%rd394, %rd8;
$L__BB1_24:
	and.b64  	%rd195, %rd58, -128;
	setp.eq.s64 	%p20, %rd195, 0;
	mov.u64 	%rd395, %rd8;
	@%p20 bra 	$L__BB1_26;
$L__BB1_25:
	shl.b64 	%rd212, %rd394, 4;
	add.s64 	%rd196, %rd21, %rd212;
	// begin inline asm
	ld.global.cs.v4.u32 {%r573,%r574,%r575,%r576}, [%rd196];
	// end inline asm
	add.s64 	%rd197, %rd196, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r577,%r578,%r579,%r580}, [%rd197];
	// end inline asm
	add.s64 	%rd198, %rd196, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r581,%r582,%r583,%r584}, [%rd198];
	// end inline asm
	add.s64 	%rd199, %rd196, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r585,%r586,%r587,%r588}, [%rd199];
	// end inline asm
	add.s64 	%rd200, %rd196, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r589,%r590,%r591,%r592}, [%rd200];
	// end inline asm
	add.s64 	%rd201, %rd196, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r593,%r594,%r595,%r596}, [%rd201];
	// end inline asm
	add.s64 	%rd202, %rd196, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r597,%r598,%r599,%r600}, [%rd202];
	// end inline asm
	add.s64 	%rd203, %rd196, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r601,%r602,%r603,%r604}, [%rd203];
	// end inline asm
	add.s64 	%rd213, %rd17, %rd212;
	// begin inline asm
	shf.r.wrap.b32 %r605, %r575, %r576, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r609, %r576, %r589, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r613, %r589, %r590, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r617, %r590, %r591, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r621, %r579, %r580, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r625, %r580, %r593, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r629, %r593, %r594, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r633, %r594, %r595, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r637, %r583, %r584, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r641, %r584, %r597, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r645, %r597, %r598, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r649, %r598, %r599, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r653, %r587, %r588, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r657, %r588, %r601, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r661, %r601, %r602, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r665, %r602, %r603, %r7;
	// end inline asm
	st.v4.u32 	[%rd213], {%r605, %r609, %r613, %r617};
	st.v4.u32 	[%rd213+512], {%r621, %r625, %r629, %r633};
	st.v4.u32 	[%rd213+1024], {%r637, %r641, %r645, %r649};
	st.v4.u32 	[%rd213+1536], {%r653, %r657, %r661, %r665};
	add.s64 	%rd204, %rd196, 2048;
	// begin inline asm
	ld.global.cs.v4.u32 {%r669,%r670,%r671,%r672}, [%rd204];
	// end inline asm
	add.s64 	%rd205, %rd196, 2560;
	// begin inline asm
	ld.global.cs.v4.u32 {%r673,%r674,%r675,%r676}, [%rd205];
	// end inline asm
	add.s64 	%rd206, %rd196, 3072;
	// begin inline asm
	ld.global.cs.v4.u32 {%r677,%r678,%r679,%r680}, [%rd206];
	// end inline asm
	add.s64 	%rd207, %rd196, 3584;
	// begin inline asm
	ld.global.cs.v4.u32 {%r681,%r682,%r683,%r684}, [%rd207];
	// end inline asm
	add.s64 	%rd208, %rd196, 2064;
	// begin inline asm
	ld.global.cs.v4.u32 {%r685,%r686,%r687,%r688}, [%rd208];
	// end inline asm
	add.s64 	%rd209, %rd196, 2576;
	// begin inline asm
	ld.global.cs.v4.u32 {%r689,%r690,%r691,%r692}, [%rd209];
	// end inline asm
	add.s64 	%rd210, %rd196, 3088;
	// begin inline asm
	ld.global.cs.v4.u32 {%r693,%r694,%r695,%r696}, [%rd210];
	// end inline asm
	add.s64 	%rd211, %rd196, 3600;
	// begin inline asm
	ld.global.cs.v4.u32 {%r697,%r698,%r699,%r700}, [%rd211];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r701, %r671, %r672, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r705, %r672, %r685, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r709, %r685, %r686, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r713, %r686, %r687, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r717, %r675, %r676, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r721, %r676, %r689, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r725, %r689, %r690, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r729, %r690, %r691, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r733, %r679, %r680, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r737, %r680, %r693, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r741, %r693, %r694, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r745, %r694, %r695, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r749, %r683, %r684, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r753, %r684, %r697, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r757, %r697, %r698, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r761, %r698, %r699, %r7;
	// end inline asm
	st.v4.u32 	[%rd213+2048], {%r701, %r705, %r709, %r713};
	st.v4.u32 	[%rd213+2560], {%r717, %r721, %r725, %r729};
	st.v4.u32 	[%rd213+3072], {%r733, %r737, %r741, %r745};
	st.v4.u32 	[%rd213+3584], {%r749, %r753, %r757, %r761};
	add.s64 	%rd395, %rd394, 256;
	add.s64 	%rd214, %rd394, 352;
	setp.lt.u64 	%p21, %rd214, %rd19;
	mov.u64 	%rd394, %rd395;
	@%p21 bra 	$L__BB1_25;
$L__BB1_26:
	setp.ge.u64 	%p22, %rd395, %rd19;
	@%p22 bra 	$L__BB1_67;
	not.b64 	%rd215, %rd395;
	add.s64 	%rd63, %rd19, %rd215;
	shr.u64 	%rd216, %rd63, 5;
	add.s64 	%rd217, %rd216, 1;
	and.b64  	%rd64, %rd217, 3;
	setp.eq.s64 	%p23, %rd64, 0;
	mov.u64 	%rd396, %rd395;
	@%p23 bra 	$L__BB1_31;
	shl.b64 	%rd220, %rd395, 4;
	add.s64 	%rd218, %rd21, %rd220;
	// begin inline asm
	ld.global.cs.v4.u32 {%r765,%r766,%r767,%r768}, [%rd218];
	// end inline asm
	add.s64 	%rd219, %rd218, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r769,%r770,%r771,%r772}, [%rd219];
	// end inline asm
	add.s64 	%rd66, %rd17, %rd220;
	// begin inline asm
	shf.r.wrap.b32 %r773, %r767, %r768, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r777, %r768, %r769, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r781, %r769, %r770, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r785, %r770, %r771, %r7;
	// end inline asm
	st.v4.u32 	[%rd66], {%r773, %r777, %r781, %r785};
	add.s64 	%rd396, %rd395, 32;
	setp.eq.s64 	%p24, %rd64, 1;
	@%p24 bra 	$L__BB1_31;
	add.s64 	%rd221, %rd218, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r789,%r790,%r791,%r792}, [%rd221];
	// end inline asm
	add.s64 	%rd222, %rd218, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r793,%r794,%r795,%r796}, [%rd222];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r797, %r791, %r792, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r801, %r792, %r793, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r805, %r793, %r794, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r809, %r794, %r795, %r7;
	// end inline asm
	st.v4.u32 	[%rd66+512], {%r797, %r801, %r805, %r809};
	add.s64 	%rd396, %rd395, 64;
	setp.eq.s64 	%p25, %rd64, 2;
	@%p25 bra 	$L__BB1_31;
	add.s64 	%rd223, %rd218, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r813,%r814,%r815,%r816}, [%rd223];
	// end inline asm
	add.s64 	%rd224, %rd218, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r817,%r818,%r819,%r820}, [%rd224];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r821, %r815, %r816, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r825, %r816, %r817, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r829, %r817, %r818, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r833, %r818, %r819, %r7;
	// end inline asm
	st.v4.u32 	[%rd66+1024], {%r821, %r825, %r829, %r833};
	add.s64 	%rd396, %rd395, 96;
$L__BB1_31:
	setp.lt.u64 	%p26, %rd63, 96;
	@%p26 bra 	$L__BB1_67;
$L__BB1_32:
	shl.b64 	%rd233, %rd396, 4;
	add.s64 	%rd225, %rd21, %rd233;
	// begin inline asm
	ld.global.cs.v4.u32 {%r837,%r838,%r839,%r840}, [%rd225];
	// end inline asm
	add.s64 	%rd226, %rd225, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r841,%r842,%r843,%r844}, [%rd226];
	// end inline asm
	add.s64 	%rd234, %rd17, %rd233;
	// begin inline asm
	shf.r.wrap.b32 %r845, %r839, %r840, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r849, %r840, %r841, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r853, %r841, %r842, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r857, %r842, %r843, %r7;
	// end inline asm
	st.v4.u32 	[%rd234], {%r845, %r849, %r853, %r857};
	add.s64 	%rd227, %rd225, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r861,%r862,%r863,%r864}, [%rd227];
	// end inline asm
	add.s64 	%rd228, %rd225, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r865,%r866,%r867,%r868}, [%rd228];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r869, %r863, %r864, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r873, %r864, %r865, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r877, %r865, %r866, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r881, %r866, %r867, %r7;
	// end inline asm
	st.v4.u32 	[%rd234+512], {%r869, %r873, %r877, %r881};
	add.s64 	%rd229, %rd225, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r885,%r886,%r887,%r888}, [%rd229];
	// end inline asm
	add.s64 	%rd230, %rd225, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r889,%r890,%r891,%r892}, [%rd230];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r893, %r887, %r888, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r897, %r888, %r889, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r901, %r889, %r890, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r905, %r890, %r891, %r7;
	// end inline asm
	st.v4.u32 	[%rd234+1024], {%r893, %r897, %r901, %r905};
	add.s64 	%rd231, %rd225, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r909,%r910,%r911,%r912}, [%rd231];
	// end inline asm
	add.s64 	%rd232, %rd225, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r913,%r914,%r915,%r916}, [%rd232];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r917, %r911, %r912, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r921, %r912, %r913, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r925, %r913, %r914, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r929, %r914, %r915, %r7;
	// end inline asm
	st.v4.u32 	[%rd234+1536], {%r917, %r921, %r925, %r929};
	add.s64 	%rd396, %rd396, 128;
	setp.lt.u64 	%p27, %rd396, %rd19;
	@%p27 bra 	$L__BB1_32;
	bra.uni 	$L__BB1_67;
$L__BB1_8:
	setp.ge.u64 	%p8, %rd6, %rd19;
	mov.u64 	%rd390, %rd5;
	@%p8 bra 	$L__BB1_14;
	add.s64 	%rd23, %rd7, %rd19;
	and.b64  	%rd131, %rd23, 128;
	setp.ne.s64 	%p9, %rd131, 0;
	mov.u64 	%rd389, %rd5;
	@%p9 bra 	$L__BB1_11;
	add.s64 	%rd132, %rd21, %rd130;
	// begin inline asm
	ld.global.cs.v4.u32 {%r21,%r22,%r23,%r24}, [%rd132];
	// end inline asm
	add.s64 	%rd133, %rd132, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r25,%r26,%r27,%r28}, [%rd133];
	// end inline asm
	add.s64 	%rd134, %rd132, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r29,%r30,%r31,%r32}, [%rd134];
	// end inline asm
	add.s64 	%rd135, %rd132, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r33,%r34,%r35,%r36}, [%rd135];
	// end inline asm
	add.s64 	%rd136, %rd132, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r37,%r38,%r39,%r40}, [%rd136];
	// end inline asm
	add.s64 	%rd137, %rd132, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r41,%r42,%r43,%r44}, [%rd137];
	// end inline asm
	add.s64 	%rd138, %rd132, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r45,%r46,%r47,%r48}, [%rd138];
	// end inline asm
	add.s64 	%rd139, %rd132, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r49,%r50,%r51,%r52}, [%rd139];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r53, %r24, %r37, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r57, %r37, %r38, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r61, %r38, %r39, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r65, %r39, %r40, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r69, %r28, %r41, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r73, %r41, %r42, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r77, %r42, %r43, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r81, %r43, %r44, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r85, %r32, %r45, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r89, %r45, %r46, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r93, %r46, %r47, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r97, %r47, %r48, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r101, %r36, %r49, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r105, %r49, %r50, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r109, %r50, %r51, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r113, %r51, %r52, %r7;
	// end inline asm
	st.v4.u32 	[%rd22], {%r53, %r57, %r61, %r65};
	st.v4.u32 	[%rd22+512], {%r69, %r73, %r77, %r81};
	st.v4.u32 	[%rd22+1024], {%r85, %r89, %r93, %r97};
	st.v4.u32 	[%rd22+1536], {%r101, %r105, %r109, %r113};
	mov.u64 	%rd389, %rd8;
$L__BB1_11:
	and.b64  	%rd141, %rd23, -128;
	setp.eq.s64 	%p10, %rd141, 0;
	mov.u64 	%rd390, %rd8;
	@%p10 bra 	$L__BB1_14;
	sub.s64 	%rd142, %rd386, %rd20;
	add.s64 	%rd25, %rd142, -1;
	not.b64 	%rd143, %rd384;
	not.b64 	%rd144, %rd15;
	max.u64 	%rd145, %rd144, %rd143;
	shl.b64 	%rd146, %rd389, 4;
	sub.s64 	%rd388, %rd146, %rd145;
	add.s64 	%rd27, %rd142, 511;
	add.s64 	%rd28, %rd142, 1023;
	add.s64 	%rd29, %rd142, 1535;
	add.s64 	%rd30, %rd142, 15;
	add.s64 	%rd31, %rd142, 527;
	add.s64 	%rd32, %rd142, 1039;
	add.s64 	%rd34, %rd142, 3599;
	add.s64 	%rd35, %rd142, 3087;
	add.s64 	%rd36, %rd142, 2575;
	add.s64 	%rd37, %rd142, 2063;
	add.s64 	%rd38, %rd142, 3583;
	add.s64 	%rd39, %rd142, 3071;
	add.s64 	%rd40, %rd142, 2559;
	add.s64 	%rd41, %rd142, 2047;
	add.s64 	%rd42, %rd142, 1551;
$L__BB1_13:
	add.s64 	%rd383, %rd385, -1;
	add.s64 	%rd147, %rd25, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r117,%r118,%r119,%r120}, [%rd147];
	// end inline asm
	add.s64 	%rd148, %rd27, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r121,%r122,%r123,%r124}, [%rd148];
	// end inline asm
	add.s64 	%rd149, %rd28, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r125,%r126,%r127,%r128}, [%rd149];
	// end inline asm
	add.s64 	%rd150, %rd29, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r129,%r130,%r131,%r132}, [%rd150];
	// end inline asm
	add.s64 	%rd151, %rd30, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r133,%r134,%r135,%r136}, [%rd151];
	// end inline asm
	add.s64 	%rd152, %rd31, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r137,%r138,%r139,%r140}, [%rd152];
	// end inline asm
	add.s64 	%rd153, %rd32, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r141,%r142,%r143,%r144}, [%rd153];
	// end inline asm
	add.s64 	%rd154, %rd42, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r145,%r146,%r147,%r148}, [%rd154];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r149, %r120, %r133, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r153, %r133, %r134, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r157, %r134, %r135, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r161, %r135, %r136, %r7;
	// end inline asm
	add.s64 	%rd163, %rd383, %rd388;
	// begin inline asm
	shf.r.wrap.b32 %r165, %r124, %r137, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r169, %r137, %r138, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r173, %r138, %r139, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r177, %r139, %r140, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r181, %r128, %r141, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r185, %r141, %r142, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r189, %r142, %r143, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r193, %r143, %r144, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r197, %r132, %r145, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r201, %r145, %r146, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r205, %r146, %r147, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r209, %r147, %r148, %r7;
	// end inline asm
	st.v4.u32 	[%rd163], {%r149, %r153, %r157, %r161};
	st.v4.u32 	[%rd163+512], {%r165, %r169, %r173, %r177};
	st.v4.u32 	[%rd163+1024], {%r181, %r185, %r189, %r193};
	st.v4.u32 	[%rd163+1536], {%r197, %r201, %r205, %r209};
	add.s64 	%rd155, %rd41, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r213,%r214,%r215,%r216}, [%rd155];
	// end inline asm
	add.s64 	%rd156, %rd40, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r217,%r218,%r219,%r220}, [%rd156];
	// end inline asm
	add.s64 	%rd157, %rd39, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r221,%r222,%r223,%r224}, [%rd157];
	// end inline asm
	add.s64 	%rd158, %rd38, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r225,%r226,%r227,%r228}, [%rd158];
	// end inline asm
	add.s64 	%rd159, %rd37, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r229,%r230,%r231,%r232}, [%rd159];
	// end inline asm
	add.s64 	%rd160, %rd36, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r233,%r234,%r235,%r236}, [%rd160];
	// end inline asm
	add.s64 	%rd161, %rd35, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r237,%r238,%r239,%r240}, [%rd161];
	// end inline asm
	add.s64 	%rd162, %rd34, %rd388;
	// begin inline asm
	ld.global.cs.v4.u32 {%r241,%r242,%r243,%r244}, [%rd162];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r245, %r216, %r229, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r249, %r229, %r230, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r253, %r230, %r231, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r257, %r231, %r232, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r261, %r220, %r233, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r265, %r233, %r234, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r269, %r234, %r235, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r273, %r235, %r236, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r277, %r224, %r237, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r281, %r237, %r238, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r285, %r238, %r239, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r289, %r239, %r240, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r293, %r228, %r241, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r297, %r241, %r242, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r301, %r242, %r243, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r305, %r243, %r244, %r7;
	// end inline asm
	st.v4.u32 	[%rd163+2048], {%r245, %r249, %r253, %r257};
	st.v4.u32 	[%rd163+2560], {%r261, %r265, %r269, %r273};
	st.v4.u32 	[%rd163+3072], {%r277, %r281, %r285, %r289};
	st.v4.u32 	[%rd163+3584], {%r293, %r297, %r301, %r305};
	add.s64 	%rd390, %rd389, 256;
	add.s64 	%rd164, %rd389, 352;
	add.s64 	%rd388, %rd388, 4096;
	setp.lt.u64 	%p11, %rd164, %rd19;
	mov.u64 	%rd389, %rd390;
	@%p11 bra 	$L__BB1_13;
$L__BB1_14:
	setp.ge.u64 	%p12, %rd390, %rd19;
	@%p12 bra 	$L__BB1_67;
	not.b64 	%rd165, %rd390;
	add.s64 	%rd48, %rd19, %rd165;
	shr.u64 	%rd166, %rd48, 5;
	add.s64 	%rd167, %rd166, 1;
	and.b64  	%rd49, %rd167, 3;
	setp.eq.s64 	%p13, %rd49, 0;
	mov.u64 	%rd391, %rd390;
	@%p13 bra 	$L__BB1_19;
	shl.b64 	%rd170, %rd390, 4;
	add.s64 	%rd168, %rd21, %rd170;
	// begin inline asm
	ld.global.cs.v4.u32 {%r309,%r310,%r311,%r312}, [%rd168];
	// end inline asm
	add.s64 	%rd169, %rd168, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r313,%r314,%r315,%r316}, [%rd169];
	// end inline asm
	add.s64 	%rd51, %rd17, %rd170;
	// begin inline asm
	shf.r.wrap.b32 %r317, %r312, %r313, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r321, %r313, %r314, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r325, %r314, %r315, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r329, %r315, %r316, %r7;
	// end inline asm
	st.v4.u32 	[%rd51], {%r317, %r321, %r325, %r329};
	add.s64 	%rd391, %rd390, 32;
	setp.eq.s64 	%p14, %rd49, 1;
	@%p14 bra 	$L__BB1_19;
	add.s64 	%rd171, %rd168, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r333,%r334,%r335,%r336}, [%rd171];
	// end inline asm
	add.s64 	%rd172, %rd168, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r337,%r338,%r339,%r340}, [%rd172];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r341, %r336, %r337, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r345, %r337, %r338, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r349, %r338, %r339, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r353, %r339, %r340, %r7;
	// end inline asm
	st.v4.u32 	[%rd51+512], {%r341, %r345, %r349, %r353};
	add.s64 	%rd391, %rd390, 64;
	setp.eq.s64 	%p15, %rd49, 2;
	@%p15 bra 	$L__BB1_19;
	add.s64 	%rd173, %rd168, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r357,%r358,%r359,%r360}, [%rd173];
	// end inline asm
	add.s64 	%rd174, %rd168, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r361,%r362,%r363,%r364}, [%rd174];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r365, %r360, %r361, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r369, %r361, %r362, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r373, %r362, %r363, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r377, %r363, %r364, %r7;
	// end inline asm
	st.v4.u32 	[%rd51+1024], {%r365, %r369, %r373, %r377};
	add.s64 	%rd391, %rd390, 96;
$L__BB1_19:
	setp.lt.u64 	%p16, %rd48, 96;
	@%p16 bra 	$L__BB1_67;
$L__BB1_20:
	shl.b64 	%rd183, %rd391, 4;
	add.s64 	%rd175, %rd21, %rd183;
	// begin inline asm
	ld.global.cs.v4.u32 {%r381,%r382,%r383,%r384}, [%rd175];
	// end inline asm
	add.s64 	%rd176, %rd175, 16;
	// begin inline asm
	ld.global.cs.v4.u32 {%r385,%r386,%r387,%r388}, [%rd176];
	// end inline asm
	add.s64 	%rd184, %rd17, %rd183;
	// begin inline asm
	shf.r.wrap.b32 %r389, %r384, %r385, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r393, %r385, %r386, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r397, %r386, %r387, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r401, %r387, %r388, %r7;
	// end inline asm
	st.v4.u32 	[%rd184], {%r389, %r393, %r397, %r401};
	add.s64 	%rd177, %rd175, 512;
	// begin inline asm
	ld.global.cs.v4.u32 {%r405,%r406,%r407,%r408}, [%rd177];
	// end inline asm
	add.s64 	%rd178, %rd175, 528;
	// begin inline asm
	ld.global.cs.v4.u32 {%r409,%r410,%r411,%r412}, [%rd178];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r413, %r408, %r409, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r417, %r409, %r410, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r421, %r410, %r411, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r425, %r411, %r412, %r7;
	// end inline asm
	st.v4.u32 	[%rd184+512], {%r413, %r417, %r421, %r425};
	add.s64 	%rd179, %rd175, 1024;
	// begin inline asm
	ld.global.cs.v4.u32 {%r429,%r430,%r431,%r432}, [%rd179];
	// end inline asm
	add.s64 	%rd180, %rd175, 1040;
	// begin inline asm
	ld.global.cs.v4.u32 {%r433,%r434,%r435,%r436}, [%rd180];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r437, %r432, %r433, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r441, %r433, %r434, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r445, %r434, %r435, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r449, %r435, %r436, %r7;
	// end inline asm
	st.v4.u32 	[%rd184+1024], {%r437, %r441, %r445, %r449};
	add.s64 	%rd181, %rd175, 1536;
	// begin inline asm
	ld.global.cs.v4.u32 {%r453,%r454,%r455,%r456}, [%rd181];
	// end inline asm
	add.s64 	%rd182, %rd175, 1552;
	// begin inline asm
	ld.global.cs.v4.u32 {%r457,%r458,%r459,%r460}, [%rd182];
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r461, %r456, %r457, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r465, %r457, %r458, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r469, %r458, %r459, %r7;
	// end inline asm
	// begin inline asm
	shf.r.wrap.b32 %r473, %r459, %r460, %r7;
	// end inline asm
	st.v4.u32 	[%rd184+1536], {%r461, %r465, %r469, %r473};
	add.s64 	%rd391, %rd391, 128;
	setp.lt.u64 	%p17, %rd391, %rd19;
	@%p17 bra 	$L__BB1_20;
$L__BB1_67:
	cvt.u32.u64 	%r1905, %rd18;
	and.b32  	%r1906, %r1905, 15;
	setp.le.u32 	%p56, %r1906, %r2;
	@%p56 bra 	$L__BB1_69;
	neg.s64 	%rd382, %rd385;
	and.b64  	%rd381, %rd382, 15;
	min.u64 	%rd380, %rd381, %rd384;
	add.s64 	%rd360, %rd380, %rd5;
	and.b64  	%rd361, %rd18, -16;
	add.s64 	%rd362, %rd360, %rd361;
	add.s64 	%rd363, %rd386, %rd362;
	ld.u8 	%rs2, [%rd363];
	add.s64 	%rd364, %rd385, %rd362;
	st.u8 	[%rd364], %rs2;
$L__BB1_69:
	mov.b64 	%rd372, railwire_copy_few_param_0;
	add.s64 	%rd371, %rd372, %rd123;
	mov.u32 	%r1917, %ntid.x;
	mov.u32 	%r1916, %nctaid.x;
	shr.u32 	%r1915, %r1917, 5;
	mul.lo.s32 	%r1914, %r1915, %r1916;
	add.s32 	%r1925, %r1925, %r1914;
	ld.param.u32 	%r1912, [railwire_copy_few_param_1];
	setp.lt.u32 	%p60, %r1925, %r1912;
	ld.param.u64 	%rd386, [%rd371];
	ld.param.u64 	%rd385, [%rd371+8];
	ld.param.u64 	%rd384, [%rd371+16];
	@%p60 bra 	$L__BB1_2;
$L__BB1_70:
	mov.u32 	%r1918, %tid.x;
	membar.sys;
	bar.sync 	0;
	setp.ne.s32 	%p58, %r1918, 0;
	@%p58 bra 	$L__BB1_73;
	ld.param.u64 	%rd373, [railwire_copy_few_param_2];
	mov.u32 	%r1919, %nctaid.x;
	cvta.to.global.u64 	%rd365, %rd373;
	atom.global.add.u32 	%r1908, [%rd365], 1;
	add.s32 	%r1910, %r1919, -1;
	setp.ne.s32 	%p59, %r1908, %r1910;
	@%p59 bra 	$L__BB1_73;
	ld.param.u64 	%rd375, [railwire_copy_few_param_4];
	ld.param.u64 	%rd374, [railwire_copy_few_param_3];
	mov.u32 	%r1911, 0;
	st.global.u32 	[%rd365], %r1911;
	membar.sys;
	cvta.to.global.u64 	%rd367, %rd374;
	st.volatile.global.u64 	[%rd367], %rd375;
$L__BB1_73:
	ret;
}
)ptx";
// clang-format on
