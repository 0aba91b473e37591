package resilience

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const (
	// nodeDelay is the longest opening of the breaker of a node that has a name, unless the options give one.
	// A node may come back under its old name, which no topology shows.
	nodeDelay = time.Second
	// refreshInterval is how often a store is asked to learn anew which node has which keys while calls fail,
	// and refreshTimeout how long it may take for that.
	refreshInterval = 250 * time.Millisecond
	refreshTimeout  = 2 * time.Second
	// failingTime is for how long after a failed call calls count as failing.
	failingTime = time.Second
	// maxNodes bounds the nodes that have policies of their own. Further ones share those of the unknown node.
	maxNodes = 1024
	// forgetTime is how long the policies of a node are kept without a call, at least; at most twice as long.
	forgetTime = time.Minute
)

// nodesPolicy is the breaker, the bulkhead and the timeout of each node of a store.
type nodesPolicy struct {
	breaker  BreakerOptions
	inFlight int
	timeout  time.Duration
	notice   func(quota.Notice)
}

func (nodesPolicy) kind() kind      { return kindBreaker }
func (p nodesPolicy) reports() bool { return p.breaker.Notice != nil }

// policies returns the policies of a node.
func (p nodesPolicy) policies(node string) []Policy {
	b := p.breaker
	b.Notice = ofNode(b.Notice, node)
	if node != "" && b.Delay == 0 {
		b.Delay = max(nodeDelay, b.FirstDelay)
	}
	return append([]Policy{Breaker(&b)}, p.guards(node)...)
}

// guards returns the policies of a node without the breaker.
func (p nodesPolicy) guards(node string) []Policy {
	timeout := timeoutPolicy{t: p.timeout, o: TimeoutOptions{MaxCalls: p.inFlight, Notice: ofNode(p.notice, node)}}
	return []Policy{Bulkhead(p.inFlight), timeout}
}

// ofNode returns a receiver of notices that names the node in them.
func ofNode(tell func(quota.Notice), node string) func(quota.Notice) {
	if tell == nil || node == "" {
		return tell
	}
	return func(n quota.Notice) {
		n.Text = "node " + node + ": " + n.Text
		tell(n)
	}
}

func (p nodesPolicy) wrap(inner quota.Store, alarms bool) (quota.Store, error) {
	placed, _ := driver.Find[driver.Placed](inner)
	d := &domains{store: inner, placed: placed, policy: p, alarms: alarms, base: time.Now().Add(-forgetTime)}
	// The first two find out whether the policies fit the store. Later ones do too.
	var err error
	if d.unknown, err = d.newStack(""); err != nil {
		return nil, err
	}
	if d.lists, err = Wrap(keptOpen{inner}, p.guards("")...); err != nil {
		return nil, err
	}
	listen(inner, p.timeout, p.notice)
	d.stacks.Store(&map[string]*stack{"": d.unknown})
	d.life, d.end = context.WithCancel(context.Background())
	return d, nil
}

// domains keeps policies for each node of a store, so that a node that fails does not take the others along.
type domains struct {
	store   quota.Store
	placed  driver.Placed
	policy  nodesPolicy
	alarms  bool
	gate    driver.Gate
	base    time.Time
	unknown *stack      // of the node without a name
	lists   quota.Store // bounds the lists over several nodes, whose breakers are those of the nodes

	failedAt   atomic.Int64 // time since base of the latest failed call
	refreshing atomic.Bool
	life       context.Context // ends with Close
	end        context.CancelFunc
	refreshes  sync.WaitGroup

	stacks atomic.Pointer[map[string]*stack] // by node; a map does not change once it is here

	mu     sync.Mutex // held while stacks is replaced, and guards the fields below
	closed bool
	swept  time.Duration // since base
}

// stack is the policies of one node around the store.
type stack struct {
	quota.Store
	node    string
	breaker *breaker
	used    atomic.Bool // since the last sweep
}

// keptOpen is the store inside a stack, which closes with the domains.
type keptOpen struct{ quota.Store }

func (s keptOpen) Unwrap() quota.Store { return s.Store }
func (keptOpen) Close() error          { return nil }

func (d *domains) newStack(node string) (*stack, error) {
	s, err := Wrap(keptOpen{d.store}, d.policy.policies(node)...)
	if err != nil {
		return nil, err
	}
	b := s.(*breaker)
	b.alarm.on = d.alarms
	return &stack{Store: s, node: node, breaker: b}, nil
}

// stack returns the policies of a node.
func (d *domains) stack(node string) *stack {
	if node == "" {
		return d.unknown
	}
	s := (*d.stacks.Load())[node]
	if s == nil {
		s = d.add(node)
	}
	if !s.used.Load() {
		s.used.Store(true)
	}
	return s
}

// add makes the policies of a node, or returns those of the unknown node if there are too many.
func (d *domains) add(node string) *stack {
	d.mu.Lock()
	defer d.mu.Unlock()
	stacks := d.sweep()
	if s := stacks[node]; s != nil {
		return s
	}
	if d.closed || len(stacks) >= maxNodes {
		return d.unknown
	}
	s, err := d.newStack(node)
	if err != nil {
		return d.unknown // not reached: the same policies fitted before
	}
	stacks = maps.Clone(stacks)
	stacks[node] = s
	d.stacks.Store(&stacks)
	return s
}

// sweep forgets the nodes without a call since the sweep before, and returns the others. The caller holds d.mu.
func (d *domains) sweep() map[string]*stack {
	stacks, now := *d.stacks.Load(), time.Since(d.base)
	if now-d.swept < forgetTime {
		return stacks
	}
	d.swept = now
	kept := make(map[string]*stack, len(stacks))
	for node, s := range stacks {
		if s.used.Swap(false) || node == "" {
			kept[node] = s
		}
	}
	d.stacks.Store(&kept)
	return kept
}

// states returns the state of each node's breaker.
func (d *domains) states() map[string]string {
	d.mu.Lock()
	stacks := d.sweep()
	d.mu.Unlock()
	states := make(map[string]string, len(stacks))
	for node, s := range stacks {
		states[node] = s.breaker.state()
	}
	return states
}

// state returns the worst state.
func (d *domains) state() string {
	worst := "closed"
	for _, state := range d.states() {
		if state == "open" || state == "half-open" && worst == "closed" {
			worst = state
		}
	}
	return worst
}

// Readings tells the numbers of the policies of each node, and of those that bound lists. Unwrap leads to those of the unknown
// node.
func (d *domains) Readings(tell func(driver.Reading)) {
	d.mu.Lock()
	stacks := d.sweep()
	d.mu.Unlock()
	for node, s := range stacks {
		if node != "" {
			ofPolicies(s.Store, func(r driver.Reading) {
				r.Node = node
				tell(r)
			})
		}
	}
	ofPolicies(d.lists, tell)
}

// ofPolicies tells the numbers of the policies of a stack.
func ofPolicies(s quota.Store, tell func(driver.Reading)) {
	for {
		w, policy := s.(layered)
		if !policy {
			return
		}
		w.(driver.Measured).Readings(tell)
		s = w.Unwrap()
	}
}

func (d *domains) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s := d.stack(d.placed.Node(c))
	decision, err := s.Charge(ctx, c)
	if err != nil {
		err = d.failed(ctx, s.node, err)
	}
	return decision, err
}

func (d *domains) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	s := d.stack(d.placed.Node(cs[0]))
	for i := 1; i < len(cs); i++ {
		if other := d.stack(d.placed.Node(cs[i])); other != s {
			if cs[0].Alternative > 0 { // so that each is asked of its own nodes, and no other's breaker is
				return fmt.Errorf("resilience: %w: the keys of the alternatives are on several nodes", quota.ErrCrossSlot)
			}
			return d.takeSeveral(ctx, append(append(make([]*stack, 0, 4), s), other), cs, i+1, out)
		}
	}
	err := s.ChargeAll(ctx, cs, out)
	if err != nil {
		err = d.failed(ctx, s.node, err)
	}
	return err
}

// takeSeveral decides a list over several nodes, of which the first charges have these. If the breaker of one of the nodes
// refuses the call, the list is not sent. A failure counts for the node that the error names.
func (d *domains) takeSeveral(ctx context.Context, nodes []*stack, cs []quota.Charge, known int, out []quota.Decision) (err error) {
next:
	for i := known; i < len(cs); i++ {
		s := d.stack(d.placed.Node(cs[i]))
		for _, n := range nodes {
			if n == s {
				continue next
			}
		}
		nodes = append(nodes, s)
	}
	permits := make([]permit, len(nodes))
	for i, n := range nodes {
		if permits[i], err = n.breaker.allow(); err != nil {
			for j := range i {
				permits[j].returned, permits[j].outcome = true, unrelated
				nodes[j].breaker.done(&permits[j])
			}
			return d.failed(ctx, n.node, err)
		}
	}
	for i, n := range nodes {
		defer n.breaker.done(&permits[i]) // each of them, even if another panics
	}
	err = d.lists.ChargeAll(ctx, cs, out)
	at := driver.NodeOf(err)
	for i, n := range nodes {
		if err == nil || n.node == at {
			n.breaker.returned(&permits[i], ctx, err)
			continue
		}
		permits[i].returned, permits[i].outcome = true, unrelated
		if i == 0 {
			n.breaker.alarm.check(err)
		}
	}
	if err != nil {
		err = d.failed(ctx, at, err)
	}
	return err
}

// failed returns the error of a failed call, which names its node, and has the topology learned anew.
func (d *domains) failed(ctx context.Context, node string, err error) error {
	if errors.Is(err, ErrRejected) {
		return at(err, node)
	}
	if judge(ctx, err) != failed {
		return err
	}
	d.failedAt.Store(int64(time.Since(d.base)))
	if !d.refreshing.Load() && d.refreshing.CompareAndSwap(false, true) {
		d.mu.Lock()
		defer d.mu.Unlock()
		if !d.closed {
			d.refreshes.Go(d.refresh)
		}
	}
	return at(err, node)
}

// at returns an error that names the node.
func at(err error, node string) error {
	if driver.NodeOf(err) != "" {
		return err
	}
	return driver.AtNode(err, node)
}

// refresh has the store learn which node has which keys until calls have not failed for a while. Calls that get to another
// node than before meet another breaker.
func (d *domains) refresh() {
	defer d.refreshing.Store(false)
	for {
		d.ask()
		select {
		case <-d.life.Done():
			return
		case <-time.After(refreshInterval):
		}
		if time.Since(d.base)-time.Duration(d.failedAt.Load()) >= failingTime {
			return
		}
	}
}

func (d *domains) ask() {
	ctx, cancel := context.WithTimeout(d.life, refreshTimeout)
	defer cancel()
	defer func() {
		if v := recover(); v != nil {
			d.unknown.breaker.notes.abandonedPanic(newPanic(v))
		}
	}()
	d.placed.Refresh(ctx) // an error is no news: the next call tells more
}

// Unwrap returns the policies of the unknown node, which stand for those of every node.
func (d *domains) Unwrap() quota.Store { return d.unknown.Store }

// Atomicity returns how far the store inside decides several keys in one step.
func (d *domains) Atomicity() driver.Atomicity { return driver.AtomicityOf(d.store) }

// Prompt reports whether every call returns by its context's deadline.
func (d *domains) Prompt() bool { return driver.IsPrompt(d.unknown.Store) }

// Close closes the store inside and the policies of all nodes.
func (d *domains) Close() error {
	if !d.gate.Close() {
		return nil
	}
	d.mu.Lock()
	d.closed = true
	stacks := *d.stacks.Load()
	d.mu.Unlock()
	d.end()
	err := d.store.Close()
	d.refreshes.Wait()
	// They wait at the same time for the calls that have not ended.
	errs := make(chan error, len(stacks)+1)
	go func() { errs <- d.lists.Close() }()
	for _, s := range stacks {
		go func() {
			err := s.Close()
			if err != nil && s.node != "" {
				err = fmt.Errorf("node %s: %w", s.node, err)
			}
			errs <- err
		}()
	}
	for range len(stacks) + 1 {
		err = errors.Join(err, <-errs)
	}
	return err
}

// BreakerStates returns the state of the breaker of each node of a store that names its nodes, by name, as [BreakerState]
// words it. "" is the node of keys whose node the store does not know, and the only one of a store that names none. The
// result is nil if the store has no breaker.
func BreakerStates(s quota.Store) map[string]string {
	if d, ok := driver.Find[interface{ states() map[string]string }](s); ok {
		return d.states()
	}
	if state := BreakerState(s); state != "" {
		return map[string]string{"": state}
	}
	return nil
}
