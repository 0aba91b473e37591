package driver

import (
	"crypto/sha256"
	"hash/maphash"
	"math/bits"
	"strconv"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// SameCharge reports whether a and b are equal in limit, key, cost, operation, time of the receipt, accepted delay, floor and least,
// hold and alternative, and both are shadows or neither: whether one may repeat the other under its request id.
func SameCharge(a, b quota.Charge) bool {
	return a.Limit.Handle() == b.Limit.Handle() && a.Key == b.Key && a.Cost == b.Cost && a.Op == b.Op && a.MadeAt == b.MadeAt && a.Within == b.Within &&
		a.Floor == b.Floor && a.FloorOf == b.FloorOf && a.Least == b.Least && a.Held == b.Held && a.Until == b.Until && a.Shadow == b.Shadow && a.Alternative == b.Alternative
}

// OnlyPeeks reports whether a list has no effect even where it is granted: all of its charges are peeks. Stores do not
// remember the id of such a list.
func OnlyPeeks(cs []quota.Charge) bool {
	for i := range cs {
		if cs[i].Op != quota.OpPeek {
			return false
		}
	}
	return true
}

// IDLifetime returns how long a store must remember the request id of a call that it grants now: for quota.IDWindow and, where
// the call ends or renews a hold, for that time after the hold lapses, for so long another call may end it.
func IDLifetime(cs []quota.Charge, now quota.Micros) time.Duration {
	from := now
	for i := range cs {
		if cs[i].Op == quota.OpSpend || cs[i].Op == quota.OpRenew {
			from = max(from, cs[i].Until)
		}
	}
	return min((from-now).Duration(), quota.Never-quota.IDWindow) + quota.IDWindow
}

// Fingerprint returns 128 bits that tell lists of charges apart: it is equal where [SameCharge] is, charge by
// charge. A store keeps it with a request id, and refuses the id where other charges come with it. It is
// cryptographic (SHA-256, cut): a caller that found two lists with one fingerprint would get the grant of one for the other.
func Fingerprint(cs []quota.Charge) [16]byte {
	text := make([]byte, 0, 256)
	for i := range cs {
		c := &cs[i]
		text = AppendKey(text, c.Limit.Name(), c.Key)
		for _, n := range [...]int64{int64(c.Op), c.Cost, int64(c.MadeAt)} {
			text = strconv.AppendInt(append(text, ' '), n, 10)
		}
		if c.Within != 0 {
			text = strconv.AppendInt(append(text, ' '), int64(c.Within), 10)
		}
		if c.Floor != 0 || c.FloorOf != 0 {
			text = strconv.AppendInt(append(text, " above "...), c.Floor, 10)
			text = strconv.AppendInt(append(text, '/'), int64(c.FloorOf), 10)
		}
		if c.Least != 0 {
			text = strconv.AppendInt(append(text, " least "...), c.Least, 10)
		}
		if c.Op.Holds() {
			text = strconv.AppendInt(append(text, " held "...), c.Held, 10)
			text = strconv.AppendInt(append(text, " until "...), int64(c.Until), 10)
		}
		if c.Shadow {
			text = append(text, " shadow"...)
		}
		if c.Alternative != 0 {
			text = strconv.AppendInt(append(text, " alternative "...), int64(c.Alternative), 10)
		}
		text = append(text, '\n')
	}
	sum := sha256.Sum256(text)
	return [16]byte(sum[:16])
}

// Hash returns a hash of a charge's limit and key, for tables in the memory of a process. Hashes of one seed, within one
// process, compare.
func Hash(seed maphash.Seed, c *quota.Charge) uint64 {
	return maphash.Comparable(seed, c.Key) ^ bits.RotateLeft64(c.Limit.Hash(), 17)
}
