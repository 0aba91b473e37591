package engine

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// call is the charges of one run of batch.lua: single charges and lists. A key has one plan in a call.
type call struct {
	keys  []callKey
	index map[string]int // of keys
	mixed bool           // neighboring keys have different plans
	lists []*list
	sent  int // how often the items were sent before, see moving.go
}

// callKey is a key of a call.
type callKey struct {
	key         string
	plan        *plan
	numbers     *numbers // that were sent
	first, last *single  // the single charges to the key, in order; nil for none
}

// send sends items in one script, or in one for each hash tag where their keys may be on several servers. It returns the
// error of the first item.
func (s *Store) send(ctx context.Context, items []queued, roundTrip any) error {
	if s.cluster || s.anyKeys() {
		s.sendParts(ctx, items, roundTrip)
	} else {
		parts := s.byTag(items)
		Each(len(parts), func(i int) error { s.sendParts(ctx, parts[i], roundTrip); return nil })
	}
	return items[0].failure()
}

// byTag returns the items for each hash tag. It refuses a list over several tags, which came when they were on one
// server as far as was known, unless the caller vouches for the server.
func (s *Store) byTag(items []queued) (parts [][]queued) {
	index := make(map[string]int, 1) // of the parts
	for _, item := range items {
		k, one := s.tagOf(item)
		if !one {
			if s.o.Batching == BatchAll {
				parts = append(parts, []queued{item})
			} else {
				item.list.err = errApart
			}
			continue
		}
		i, known := index[k]
		if !known {
			i = len(parts)
			index[k] = i
			parts = append(parts, nil)
		}
		parts[i] = append(parts[i], item)
	}
	return parts
}

// tagOf returns the hash tag of an item's keys, and whether they have one only.
func (s *Store) tagOf(item queued) (first string, one bool) {
	if q := item.single; q != nil {
		s.locate(&q.target, &q.charge)
		return tag(q.target.key), true
	}
	q := item.list
	for i := range q.targets {
		s.locate(&q.targets[i], &q.charges[i])
		if i > 0 && !s.together(&q.targets[0], &q.targets[i]) {
			return "", false
		}
	}
	return tag(q.targets[0].key), true
}

var errApart = fmt.Errorf("redis: %w: the keys may be on several servers, and nothing was sent", quota.ErrCrossSlot)

// sendParts sends items in one script. Where the numbers of a key's limit changed, the items with the other
// numbers follow in a script of their own.
func (s *Store) sendParts(ctx context.Context, items []queued, roundTrip any) {
	for rest := items; len(rest) > 0; {
		var c *call
		c, rest = s.newCall(rest)
		s.sendCall(ctx, c, roundTrip)
	}
}

// failure returns the error of an item that was sent.
func (q queued) failure() error {
	if q.single != nil {
		return q.single.err
	}
	return q.list.err
}

// newCall returns a call with items, and the items that do not go with the others.
func (s *Store) newCall(items []queued) (c *call, left []queued) {
	c = &call{keys: make([]callKey, 0, len(items)), index: make(map[string]int, len(items))}
	var before *single
	k := 0
	for _, item := range items {
		if item.list != nil {
			if !c.addList(item.list) {
				left = append(left, item)
			}
			continue
		}
		q := item.single
		if before == nil || q.charge.Limit != before.charge.Limit || q.charge.Key != before.charge.Key {
			s.locate(&q.target, &q.charge)
			k = c.addKey(&q.target)
			before = q
		}
		switch key := &c.keys[k]; {
		case key.plan != q.target.plan:
			left = append(left, item)
		case key.first == nil:
			key.first, key.last = q, q
		default:
			key.last.next = q
			key.last = q
		}
	}
	if c.mixed {
		c.sort()
	}
	return c, left
}

// addKey returns the index of a target's key in the call, and adds the key if it is new.
func (c *call) addKey(t *target) int {
	k, known := c.index[t.key]
	if !known {
		k = len(c.keys)
		c.index[t.key] = k
		c.mixed = c.mixed || k > 0 && c.keys[k-1].plan != t.plan
		c.keys = append(c.keys, callKey{key: t.key, plan: t.plan})
	}
	return k
}

// addList adds a list, unless the call has a key of it with another plan.
func (c *call) addList(q *list) bool {
	before := len(c.keys)
	q.indexes = q.indexes[:0]
	for i := range q.targets {
		k := c.addKey(&q.targets[i])
		if c.keys[k].plan != q.targets[i].plan {
			for _, added := range c.keys[before:] {
				delete(c.index, added.key)
			}
			c.keys = c.keys[:before]
			return false
		}
		q.indexes = append(q.indexes, k)
	}
	c.lists = append(c.lists, q)
	return true
}

// sort puts keys with the same plan side by side.
func (c *call) sort() {
	slices.SortStableFunc(c.keys, func(a, b callKey) int { return cmp.Compare(a.plan.serial, b.plan.serial) })
	if len(c.lists) == 0 {
		return
	}
	for k := range c.keys {
		c.index[c.keys[k].key] = k
	}
	for _, q := range c.lists {
		for i := range q.targets {
			q.indexes[i] = c.index[q.targets[i].key]
		}
	}
}

// sendCall sends a call and writes the answers into its charges. A call that is refused because of some keys
// is sent again in parts.
func (s *Store) sendCall(ctx context.Context, c *call, roundTrip any) {
	err := errEnded
	defer func() { c.failed(err, roundTrip) }()
	err = s.decideCall(ctx, c)
	if err != nil && ofSomeKeys(err) {
		if parts := c.parts(); len(parts) > 1 {
			Each(len(parts), func(i int) error { s.sendCall(ctx, parts[i], roundTrip); return nil })
			err = nil
		}
	} else if err == nil {
		s.sendAgain(ctx, c, roundTrip)
	}
}

// decideCall sends a call and decides its charges. An error is about the call as a whole.
func (s *Store) decideCall(ctx context.Context, c *call) (err error) {
	sent := false
	defer func() {
		if v := recover(); v != nil {
			err = panics.Error("redis", "a function", v, sent)
		}
	}()
	script, args, keys := s.encode(c)
	sent = true
	r, err := s.run(ctx, script, args, keys, c.calls())
	if err == nil {
		s.scripts.ran(script)
		err = s.conclude(c, r)
	}
	return err
}

// calls returns how many single charges and lists the call has.
func (c *call) calls() int {
	n := len(c.lists)
	for i := range c.keys {
		for q := c.keys[i].first; q != nil; q = q.next {
			n++
		}
	}
	return n
}

// ids returns how many of the call's lists have a request id.
func (c *call) ids() (n int) {
	for _, q := range c.lists {
		if q.charges[0].ID != "" {
			n++
		}
	}
	return n
}

// failed writes an error of a call as a whole into its charges, unless it is nil.
func (c *call) failed(err error, roundTrip any) {
	if err == nil {
		return
	}
	if roundTrip != nil {
		err = driver.WithRoundTrip(err, roundTrip)
	}
	for i := range c.keys {
		for q := c.keys[i].first; q != nil; q = q.next {
			q.err = err
		}
	}
	for _, q := range c.lists {
		q.err = err
	}
}

// parts returns a call for the single charges to each key, and one for each list.
func (c *call) parts() (parts []*call) {
	for i := range c.keys {
		if c.keys[i].first != nil {
			parts = append(parts, &call{keys: c.keys[i : i+1]})
		}
	}
	for _, q := range c.lists {
		part := &call{index: map[string]int{}}
		part.addList(q)
		parts = append(parts, part)
	}
	return parts
}

// encode returns the script of a call, its arguments and the number of its keys, see batch.lua.
func (s *Store) encode(c *call) (script *script, args []any, keys int) {
	runs := 1
	for i := 1; i < len(c.keys); i++ {
		if c.keys[i].plan != c.keys[i-1].plan {
			runs++
		}
	}
	rules := make([]quota.Rule, 0, runs)
	args = make([]any, 3, 3+2+3*runs+2*len(c.keys)+3*len(c.lists)+1)
	for i := range c.keys {
		args = append(args, c.keys[i].key)
	}
	for _, q := range c.lists {
		if q.charges[0].ID != "" {
			args = append(args, s.idKey(&q.charges[0]))
		}
	}
	keys = len(args) - 3
	args = append(args, text(len(c.keys)), text(len(c.lists)))
	for i := 0; i < len(c.keys); {
		p := c.keys[i].plan
		n := 1
		for i+n < len(c.keys) && c.keys[i+n].plan == p {
			n++
		}
		sent := s.numbers(p)
		args = append(args, p.header, sent.params, text(n))
		for k := range c.keys[i : i+n] {
			c.keys[i+k].numbers = sent
			args = append(args, c.keys[i+k].asked())
		}
		rules = append(rules, p.rule)
		i += n
	}
	for _, q := range c.lists {
		args = append(args, q.asked())
		if q.charges[0].ID != "" {
			args = append(args, q.head())
		}
	}
	script = s.scripts.batch(rules)
	args[0], args[1], args[2] = evalSHA, script.sha, text(keys)
	return script, s.appendClock(args), keys
}

// asked returns the argument for the single charges to a key.
func (k *callKey) asked() any {
	switch {
	case k.first == nil:
		return none
	case k.first == k.last && k.first.charge.Op == quota.OpTake && k.first.charge.Floor == 0:
		return cost(&k.first.charge)
	}
	var dst []byte
	for q := k.first; q != nil; {
		c, times := &q.charge, int64(0)
		for r := c.Request(); q != nil && q.charge.Request() == r; q = q.next {
			times++
		}
		dst = append(appendCharge(dst, c), ' ')
		dst = append(strconv.AppendInt(dst, times, 10), ' ')
	}
	return string(dst)
}

// asked returns the argument for a list.
func (q *list) asked() string {
	dst := make([]byte, 0, 128)
	if q.charges[0].ID != "" {
		dst = append(dst, '#')
	}
	for i := range q.charges {
		c := &q.charges[i]
		op := int64(c.Op)
		if c.Shadow {
			op += shadowFlag
		}
		if i > 0 && c.Alternative != q.charges[i-1].Alternative {
			op += alternativeFlag
		}
		r := c.Request()
		if r.Floor > 0 {
			op += floorFlag
		}
		for _, n := range [...]int64{int64(q.indexes[i] + 1), op, min(c.Cost, maxCost), int64(r.Arg)} {
			dst = appendNumber(dst, n)
		}
		if r.Floor > 0 {
			dst = appendNumber(dst, min(r.Floor, maxCost))
		}
	}
	return string(dst)
}

// Flags are added to the operation of a charge in a list: of a shadow, which must not deny it, of the first charge of an
// alternative but the first, and of a charge whose floor follows. A shadow alone has no list to deny.
const (
	shadowFlag      = 256
	alternativeFlag = 512
	floorFlag       = 1024
)

// appendCharge appends a charge as batch.lua reads it among single charges: "op cost at", or "op cost at+floor".
func appendCharge(dst []byte, c *quota.Charge) []byte {
	dst = append(strconv.AppendInt(dst, int64(c.Op), 10), ' ')
	dst = append(strconv.AppendInt(dst, min(c.Cost, maxCost), 10), ' ')
	r := c.Request()
	if dst = strconv.AppendInt(dst, int64(r.Arg), 10); r.Floor > 0 {
		dst = strconv.AppendInt(append(dst, '+'), min(r.Floor, maxCost), 10)
	}
	return dst
}

// conclude decides the charges again on the states that the script found. An error is about the call as a
// whole.
func (s *Store) conclude(c *call, r Reply) error {
	now, positive, ok := stamp(r.Int(0))
	changes, counted := r.Int(1)
	record := 2 + len(c.keys) // the element of the next request id
	if !ok || !positive || !counted || r.Len() != record+c.ids() {
		return badReply(r)
	}
	var items []driver.Item // of the keys, for the lists
	var broken []error
	if len(c.lists) > 0 {
		items, broken = make([]driver.Item, len(c.keys)), make([]error, len(c.keys))
	}
	var undecided []*error // of charges whose algorithm panicked, and of those behind them: their states are not known
	for k := range c.keys {
		it, misfit, err := itemOf(r, 2+k)
		if err != nil {
			return err
		}
		c.keys[k].plan.saw(numberSize * len(it.State.Tail))
		if misfit == nil && !c.keys[k].numbers.serve(now) {
			misfit = errNotServed
			s.shows(now)
		}
		for q := c.keys[k].first; q != nil; q = q.next {
			if q.err = misfit; misfit == nil {
				q.err = applyOne(&q.charge, &it, now, &q.decision)
			}
			switch {
			case panics.Is(q.err):
				misfit = q.err
				undecided = append(undecided, &q.err)
			case q.err == nil && it.Write:
				changes--
			}
		}
		if items != nil {
			items[k], broken[k] = it, misfit
		}
	}
	for _, q := range c.lists {
		if q.charges[0].ID != "" {
			found, err := q.replay(r, record)
			if err != nil {
				return err
			}
			if record++; found {
				continue
			}
		}
		granted := q.conclude(items, broken, now)
		if granted {
			changes--
		}
		if panics.Is(q.err) {
			undecided = append(undecided, &q.err)
			for _, k := range q.indexes {
				if broken[k] == nil {
					broken[k] = q.err
				}
			}
		}
	}
	switch {
	case changes == 0:
	case len(undecided) == 0:
		return differs(c.keys[0].plan)
	default:
		for _, err := range undecided {
			*err = uncertain("the script may have charged: %v", *err)
		}
	}
	return nil
}

// conclude decides a list on the items of the call's keys, and reports whether it was granted.
func (q *list) conclude(items []driver.Item, broken []error, now quota.Micros) bool {
	var few [8]driver.Item
	its := few[:0]
	q.err = nil
	for _, k := range q.indexes {
		if q.err == nil {
			q.err = broken[k]
		}
		its = append(its, items[k])
	}
	if q.err == nil {
		q.err = Catch("an algorithm", false, func() error { return driver.Apply(q.charges, its, now, q.decisions) })
	}
	if q.err != nil {
		return false
	}
	for i, k := range q.indexes {
		if its[i].Write {
			items[k] = its[i]
		}
	}
	return quota.Granted(q.decisions)
}

// itemOf returns the state that element i of a reply holds, or as misfit that the key holds something else.
// An error is about the reply.
func itemOf(r Reply, i int) (it driver.Item, misfit, err error) {
	if value, text := r.Text(i); text {
		it, misfit = unpack(value)
		return it, misfit, nil
	}
	if n, ok := r.Int(i); !ok || n != 0 {
		return it, nil, badReply(r)
	}
	return it, errType, nil
}

var errType = fmt.Errorf("redis: %w: WRONGTYPE: the key holds no string", quota.ErrMisconfigured)
