package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// asked is a key of a batch and the charges to it, in order.
type asked struct {
	key         string
	plan        *plan
	first, last *single
}

// sendSingles decides singles in one script. Where the numbers of a key's limit changed, the charges with the
// other numbers follow in a script of their own.
func (s *Store) sendSingles(ctx context.Context, roundTrip any, singles []*single) {
	for len(singles) > 0 {
		var keys []asked
		keys, singles = s.byKey(singles)
		s.sendKeys(ctx, roundTrip, keys)
	}
}

// sendKeys decides what is asked of keys in one script, or each key alone if that is refused because of some.
func (s *Store) sendKeys(ctx context.Context, roundTrip any, keys []asked) {
	rules := make([]quota.Rule, 0, 4)
	args := make([]any, 3, 3+2*len(keys)+3*cap(rules)+1)
	for i := range keys {
		args = append(args, keys[i].key)
	}
	for i := 0; i < len(keys); {
		p := keys[i].plan
		n := 1
		for i+n < len(keys) && keys[i+n].plan == p {
			n++
		}
		args = append(args, p.header, p.params, text(n))
		for _, k := range keys[i : i+n] {
			args = append(args, k.todo())
		}
		rules = append(rules, p.rule)
		i += n
	}
	script := s.scripts.several(rules, batchText)
	args[0], args[1], args[2] = evalSHA, script.sha, text(len(keys))
	r, err := s.run(ctx, script, s.appendClock(args), len(keys))
	switch {
	case err == nil:
		err = conclude(keys, r)
	case len(keys) > 1 && ofSomeKeys(err):
		each(len(keys), func(i int) { s.sendKeys(ctx, roundTrip, keys[i:i+1]) })
		return
	}
	if err != nil {
		err = driver.Share(err, roundTrip)
		for i := range keys {
			for u := keys[i].first; u != nil; u = u.next {
				u.err = err
			}
		}
	}
}

// byKey returns the keys of singles, those with the same plan together, and the singles that are left out.
func (s *Store) byKey(singles []*single) (keys []asked, left []*single) {
	keys = make([]asked, 0, len(singles))
	places := make(map[string]int, len(singles))
	mixed, n := false, 0
	for i, u := range singles {
		if i == 0 || u.charge.Limit != singles[i-1].charge.Limit || u.charge.Key != singles[i-1].charge.Key {
			key := s.key(&u.charge)
			var known bool
			if n, known = places[key]; !known {
				n = len(keys)
				places[key] = n
				mixed = mixed || n > 0 && keys[n-1].plan != u.plan
				keys = append(keys, asked{key: key, plan: u.plan})
			}
		}
		switch k := &keys[n]; {
		case k.plan != u.plan:
			left = append(left, u)
		case k.first == nil:
			k.first, k.last = u, u
		default:
			k.last.next = u
			k.last = u
		}
	}
	if mixed {
		slices.SortStableFunc(keys, func(a, b asked) int { return cmp.Compare(a.plan.serial, b.plan.serial) })
	}
	return keys, left
}

// todo is the argument that says what is asked of a key.
func (k *asked) todo() any {
	if k.first == k.last && k.first.charge.Op == quota.OpTake {
		return cost(&k.first.charge)
	}
	var dst []byte
	for u := k.first; u != nil; {
		c, times := &u.charge, int64(0)
		for ; u != nil && u.charge.Op == c.Op && u.charge.Cost == c.Cost && u.charge.At == c.At; u = u.next {
			times++
		}
		for _, n := range [...]int64{int64(c.Op), min(c.Cost, maxCost), int64(c.At), times} {
			dst = append(strconv.AppendInt(dst, n, 10), ' ')
		}
	}
	return string(dst)
}

// conclude decides the singles again on what the script found. An error is about the call as a whole.
func conclude(keys []asked, r Reply) error {
	now, positive, ok := stamp(r)
	changes, counted := r.Int(1)
	if !ok || !positive || !counted || r.Len() != 2+len(keys) {
		return badReply(r)
	}
	for i := range keys {
		it, broken, err := held(r, 2+i)
		if err != nil {
			return err
		}
		for u := keys[i].first; u != nil; u = u.next {
			if u.err = broken; broken == nil {
				if u.err = driver.ApplyOne(&u.charge, &it, now, &u.decision); u.err == nil && it.Write {
					changes--
				}
			}
		}
	}
	if changes != 0 {
		return differs(keys[0].first.charge.Limit)
	}
	return nil
}

// held returns what element i of a reply says that a key holds, and as broken that it is no state. An error
// is about the reply.
func held(r Reply, i int) (it driver.Item, broken, err error) {
	if value, text := r.Text(i); text {
		it, broken = unpack(value)
		return it, broken, nil
	}
	if n, ok := r.Int(i); !ok || n != 0 {
		return it, nil, badReply(r)
	}
	return it, errType, nil
}

var errType = fmt.Errorf("redis: %w: WRONGTYPE: the key holds no text", quota.ErrMisconfigured)
