package local

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A grant under a request id is remembered in a slot, whose key is the group and the id. Behind the key the slot's text has
// the charges and the decisions, in slot.a and slot.b bytes; slot.c is the time of the decisions.

// request is a call with a request id.
type request struct {
	key     string
	hash    uint64
	class   uint64
	charges []byte // as appendCharges writes them
}

func (s *Store) request(cs []quota.Charge) *request {
	group := quota.Group(cs[0].Key)
	key := group + "/" + cs[0].ID // a group has no slash
	return &request{key: key, hash: maphash.String(s.seed, key), class: s.classOf(key), charges: appendCharges(nil, cs)}
}

// repeat reports whether the request's id was granted, and writes the decisions of that time to out. It fails with
// ErrInvalid where other charges were granted.
func (s *Store) repeat(r *request, cs []quota.Charge, now quota.Micros, out []quota.Decision) (granted bool, err error) {
	sh := &s.shards[r.hash%shardCount]
	n := sh.find(r.hash, unique.Handle[string]{}, r.key)
	if n < 0 {
		return false, nil
	}
	sl := sh.table.slots.at(uint32(n))
	if sl.expires <= now {
		sh.remove(tag(r.hash), uint32(n), s)
		return false, nil
	}
	text := sh.table.read(nil, sl, len(r.key)+int(sl.a+sl.b))[len(r.key):]
	if string(text[:sl.a]) != string(r.charges) {
		return true, fmt.Errorf("local: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
	}
	text = text[sl.a:]
	for i := range out {
		d := &out[i]
		*d = quota.Decision{Replayed: true, Shadow: cs[i].Shadow, Alternative: cs[i].Alternative, At: quota.Micros(sl.c)}
		for _, n := range [...]*int64{&d.Capacity, &d.Remaining, &d.Charged, (*int64)(&d.ResetAfter), (*int64)(&d.Delay), (*int64)(&d.RetryAfter), &d.Held, (*int64)(&d.Until)} {
			var size int
			*n, size = binary.Varint(text)
			text = text[size:]
		}
		d.Allowed = d.RetryAfter == 0
	}
	return true, nil
}

// remember keeps the grant of a request.
func (s *Store) remember(r *request, cs []quota.Charge, now quota.Micros, ds []quota.Decision) {
	sh := &s.shards[r.hash%shardCount]
	var few [48]byte
	text := few[:0]
	for i := range ds {
		d := &ds[i]
		for _, n := range [...]int64{d.Capacity, d.Remaining, d.Charged, int64(d.ResetAfter), int64(d.Delay), int64(d.RetryAfter), d.Held, int64(d.Until)} {
			text = binary.AppendVarint(text, n)
		}
	}
	n := sh.insert(r.hash, r.key+string(r.charges)+string(text), len(r.key), idKind)
	sl := sh.table.slots.at(uint32(n))
	sl.a, sl.b, sl.c = int64(len(r.charges)), int64(len(text)), int64(now)
	sh.expire(sl, now+quota.Micros(driver.IDLifetime(cs, now)/time.Microsecond)+1)
	sh.due += newSlot
}

// appendCharges appends the fields of charges by which driver.SameCharge compares them.
func appendCharges(dst []byte, cs []quota.Charge) []byte {
	for i := range cs {
		c := &cs[i]
		for _, text := range [...]string{c.Limit.Name(), c.Key} {
			dst = append(binary.AppendUvarint(dst, uint64(len(text))), text...)
		}
		dst = append(dst, byte(c.Op))
		if c.Shadow {
			dst[len(dst)-1] |= 1 << 7
		}
		for _, n := range [...]int64{c.Cost, int64(c.MadeAt), int64(c.Within), c.Floor, int64(c.FloorOf), c.Least, c.Held, int64(c.Until), int64(c.Alternative)} {
			dst = binary.AppendVarint(dst, n)
		}
	}
	return dst
}
