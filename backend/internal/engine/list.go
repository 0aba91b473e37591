package engine

import (
	"context"
	"strconv"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// list is charges that are decided all-or-nothing, and the answer.
type list struct {
	plans     []*plan
	charges   []quota.Charge
	places    []int // of the charges' keys in a call
	decisions []quota.Decision
	err       error
}

// sendLists decides lists in one script, in order. Lists with a request id go alone. Where the numbers of a
// key's limit changed, the lists with the other numbers follow in a script of their own.
func (s *Store) sendLists(ctx context.Context, lists []*list) {
	for len(lists) > 0 {
		var c call
		lists = s.fill(&c, lists)
		r, err := s.sendCall(ctx, &c)
		switch {
		case err == nil:
			err = c.conclude(r)
		case len(c.lists) > 1 && ofSomeKeys(err):
			each(len(c.lists), func(i int) { s.sendLists(ctx, c.lists[i:i+1]) })
			continue
		}
		if err != nil {
			for _, q := range c.lists {
				q.err = err
			}
		}
	}
}

// call is lists whose keys have one plan each.
type call struct {
	lists []*list
	keys  []string
	plans []*plan // of keys
}

// fill puts lists into a call and returns those that do not go with the others.
func (s *Store) fill(c *call, lists []*list) (left []*list) {
	known := map[string]int{}
	for _, q := range lists {
		q.places = q.places[:0]
		keys, plans := c.keys, c.plans
		for i := range q.charges {
			key := s.key(&q.charges[i])
			n, there := known[key]
			if !there {
				n = len(keys)
				keys, plans = append(keys, key), append(plans, q.plans[i])
				known[key] = n
			}
			if plans[n] != q.plans[i] {
				for _, key := range keys[len(c.keys):] {
					delete(known, key)
				}
				q.places = nil
				break
			}
			q.places = append(q.places, n)
		}
		if q.places == nil {
			left = append(left, q)
			continue
		}
		c.lists, c.keys, c.plans = append(c.lists, q), keys, plans
	}
	return left
}

// sendCall sends a call.
func (s *Store) sendCall(ctx context.Context, c *call) (Reply, error) {
	rules := make([]quota.Rule, len(c.plans))
	for i, p := range c.plans {
		rules[i] = p.rule
	}
	first := c.lists[0].charges
	keys := len(c.keys)
	if first[0].ID != "" {
		keys++
	}
	script := s.scripts.several(rules, listText)
	args := make([]any, 0, 3+keys+3+len(c.lists)+2*len(c.plans)+1)
	args = append(args, evalSHA, script.sha, text(keys))
	for _, key := range c.keys {
		args = append(args, key)
	}
	record, lifetime := any(""), any("0")
	if first[0].ID != "" {
		args = append(args, s.idKey(&first[0]))
		if !driver.OnlyPeeks(first) {
			record, lifetime = recordHead(first), idLifetime
		}
	}
	args = append(args, record, lifetime, text(len(c.lists)))
	for _, q := range c.lists {
		args = append(args, q.todo())
	}
	for _, p := range c.plans {
		args = append(args, p.header, p.params)
	}
	return s.run(ctx, script, s.appendClock(args), keys)
}

// todo is the argument that says what a list asks.
func (q *list) todo() string {
	dst := make([]byte, 0, 32*len(q.charges))
	for i := range q.charges {
		c := &q.charges[i]
		for _, n := range [...]int64{int64(q.places[i] + 1), int64(c.Op), min(c.Cost, maxCost), int64(c.At)} {
			dst = append(strconv.AppendInt(dst, n, 10), ' ')
		}
	}
	return string(dst)
}

// conclude decides the lists again on what the script found. An error is about the call as a whole.
func (c *call) conclude(r Reply) error {
	first := c.lists[0]
	if r.Len() == 1 && first.charges[0].ID != "" {
		if grant, ok := r.Text(0); ok {
			first.err = replay(grant, first.charges, first.decisions)
			return nil
		}
	}
	now, positive, ok := stamp(r)
	granted, counted := r.Int(1)
	if !ok || !positive || !counted || r.Len() != 2+len(c.keys) {
		return badReply(r)
	}
	items, errs := make([]driver.Item, len(c.keys)), make([]error, len(c.keys))
	for k := range c.keys {
		var err error
		if items[k], errs[k], err = held(r, 2+k); err != nil {
			return err
		}
	}
	var few [8]driver.Item
	for _, q := range c.lists {
		its := few[:0]
		q.err = nil
		for _, k := range q.places {
			if q.err == nil {
				q.err = errs[k]
			}
			its = append(its, items[k])
		}
		if q.err == nil {
			q.err = driver.Apply(q.charges, its, now, q.decisions)
		}
		if q.err != nil {
			continue
		}
		for i, k := range q.places {
			items[k] = its[i]
		}
		if quota.Granted(q.decisions) {
			granted--
		}
	}
	if granted != 0 {
		return differs(first.charges[0].Limit)
	}
	return nil
}
