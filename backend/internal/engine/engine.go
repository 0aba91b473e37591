package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Client sends commands to a server or a cluster. Methods may be called concurrently.
type Client interface {
	// Do sends one EVALSHA or EVAL. args is the whole command, and its elements are strings; keys is the
	// number of keys in it, at least 1. The command must be sent once: the client's own retries must not
	// apply to it. Do returns an error for which IsNoScript is true as it is, and all other errors as
	// ReplyError or TransportError makes them.
	Do(ctx context.Context, args []any, keys int) (Reply, error)
	// Info returns the text of the server's INFO, or of each master of a cluster.
	Info(ctx context.Context) ([]string, error)
	// Close closes the client, if the store owns it.
	Close() error
}

// Reply is an array reply of integers, bulk strings and nulls, or a Bulk. Other elements are neither an Int nor a Text.
type Reply interface {
	// Len returns the number of elements; it is 0 if the reply is neither an array nor a bulk string.
	Len() int
	// Int returns element i if it is an integer.
	Int(i int) (n int64, ok bool)
	// Text returns element i if it is a bulk string, or "" if it is null.
	Text(i int) (text string, ok bool)
}

// Bulk is the Reply of a bulk string that stands alone, as that of an array with nothing else.
type Bulk string

func (Bulk) Len() int              { return 1 }
func (Bulk) Int(int) (int64, bool) { return 0, false }
func (b Bulk) Text(i int) (string, bool) {
	if i != 0 {
		return "", false
	}
	return string(b), true
}

// Options are common to all stores in Redis. The zero value has the defaults.
type Options struct {
	// Prefix begins every key; "" is DefaultPrefix. 1 to 64 printable ASCII characters without braces.
	Prefix string
	// Strict refuses a list of charges whose groups lie in different hash slots with ErrCrossSlot, on a
	// single node too, and bounds batches to a slot. Otherwise a server that is known to be the only one
	// decides any list in one step. Other lists are decided slot by slot: if one slot denies, the charges that
	// the other slots granted are given back.
	Strict bool
	// Batching says which charges may share a script; the zero value is BatchAuto.
	Batching Batching
	// Notice receives the notices for operators, see quota.Notice; nil drops them. It may be called
	// concurrently.
	Notice func(quota.Notice)
	// Clock replaces the server's time, for tests; nil stands for the server's time.
	Clock func() time.Time
}

// Batching says which charges may share a script. Where it is not off, a charge waits if four scripts to its
// server, or to its slot, are in flight; when the first of them ends, all waiting charges go together.
type Batching uint8

const (
	// BatchAuto learns whether the address of a store is one server, see learn.go. If so, all charges may
	// share a script, else those of one hash tag, and of one slot of a cluster.
	BatchAuto Batching = iota
	// BatchSlot lets charges of one hash tag share a script, and of one slot of a cluster. It asks no server.
	BatchSlot
	// BatchAll lets all charges share a script, and decides any list in one step: the caller knows that there
	// is one server. It is refused for a cluster, and with Strict.
	BatchAll
	// BatchNone sends every decision in a script of its own. Lists are decided as with BatchAuto.
	BatchNone
)

// DefaultPrefix begins the keys of stores whose options name no other prefix.
const DefaultPrefix = "quota:"

// Store is a quota.Store over a Client. Methods may be called concurrently.
type Store struct {
	client  Client
	placer  Placer // nil unless the client is one, of a cluster
	warmer  Warmer // nil unless the client is one
	o       Options
	cluster bool
	reach   reach
	scripts *scripts
	cas     quota.Store
	gate    driver.Gate
	evicted atomic.Int64
	seen    atomic.Pointer[driver.Health] // the last
	batches atomic.Int64                  // scripts that were sent with calls
	batched atomic.Int64                  // these calls
	ahead   atomic.Int64                  // µs, of the server's clock, as far as it is known, see moving.go
	skew    atomic.Int64                  // µs, see Skew
	crowded atomic.Bool                   // the notice about too many rules was given
	crowds  crowds                        // of a cluster

	origin    string       // begins the ids of give-backs; no other store has it
	givenBack atomic.Int64 // numbers give-backs
	backs     Background   // give-backs that are under way

	life     context.Context // ends with Close
	end      context.CancelFunc
	attempts Background                            // at making nodes ready, and at learning
	unnamed  readiness                             // of a single server, and of the node of a cluster that is not known
	placed   atomic.Pointer[placement]             // the masters, as a listing saw them last
	named    atomic.Pointer[map[string]*readiness] // by node; a map does not change once it is here

	all     Queue[queued] // of charges to any slot
	slots   slotQueues    // of charges to one slot
	batcher Batcher[queued]

	// mu guards plans, planned and reports, and is held while named is replaced. Only bytes and moved change in a plan once it
	// is in the map.
	mu      sync.RWMutex
	plans   map[quota.Spec]*plan
	planned int64
	reports []driver.Reports // grows at its end
}

// plan holds the arguments that all charges to a limit send, boxed once.
type plan struct {
	rule   quota.Rule
	serial int64   // orders plans
	script *script // nil for an algorithm without Lua
	header any     // the first bytes of a state, see header
	fixed  numbers // of Spec.Params
	unit   int64
	moving driver.Moving           // nil for an algorithm whose numbers do not move
	moved  atomic.Pointer[numbers] // that were sent last
	bytes  atomic.Int64            // of a state's list, on average, see work; 0 if it has none
}

const maxPlans = 4096

// New returns a store over a client. cluster says that keys of different slots may live on different nodes.
// New fails with ErrInvalid if an option is not accepted.
func New(client Client, cluster bool, o Options) (*Store, error) {
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if !validPrefix(o.Prefix) {
		return nil, fmt.Errorf("redis: %w: Options.Prefix is %q; accepted: 1 to 64 printable ASCII characters without braces", quota.ErrInvalid, o.Prefix)
	}
	switch accepted := "BatchAuto, BatchSlot, BatchAll or BatchNone"; {
	case o.Batching > BatchNone:
		return nil, fmt.Errorf("redis: %w: Options.Batching is %d; accepted: %s", quota.ErrInvalid, o.Batching, accepted)
	case o.Batching == BatchAll && cluster:
		return nil, fmt.Errorf("redis: %w: Options.Batching is BatchAll; accepted with a cluster: BatchAuto, BatchSlot or BatchNone", quota.ErrInvalid)
	case o.Batching == BatchAll && o.Strict:
		return nil, fmt.Errorf("redis: %w: Options.Batching is BatchAll; accepted with Options.Strict: BatchAuto, BatchSlot or BatchNone", quota.ErrInvalid)
	}
	s := &Store{client: client, o: o, origin: "give-back-" + rand.Text() + "-", cluster: cluster, scripts: newScripts(o.Clock != nil), plans: map[quota.Spec]*plan{}, crowds: newCrowds()}
	if cluster {
		s.placer, _ = client.(Placer)
	}
	s.batcher = Batcher[queued]{Max: maxBatch, Send: s.send}
	s.reach.init(o.Batching, cluster)
	s.warmer, _ = client.(Warmer)
	s.named.Store(&map[string]*readiness{})
	s.life, s.end = context.WithCancel(context.Background())
	var err error
	s.cas, err = driver.NewCAS(&kv{s}, nil) // its lists are those that one script can decide
	return s, err
}

func validPrefix(p string) bool {
	for i := range len(p) {
		if c := p[i]; c <= ' ' || c > '~' || c == '{' || c == '}' {
			return false
		}
	}
	return len(p) <= 64
}

// Close closes the store, and the client if the store owns it. Waiting charges fail with ErrClosed. Close
// returns when no batch is in flight, and no attempt at making a node ready is under way.
func (s *Store) Close() error {
	if !s.gate.Close() {
		return nil
	}
	s.all.Close()
	s.slots.close()
	s.end()
	err := s.cas.Close() // and the client
	s.batcher.Wait()
	s.attempts.Wait()
	s.backs.Wait()
	return err
}

// Atomicity says which lists are always decided in one step. It does not change when the store learns.
func (s *Store) Atomicity() driver.Atomicity {
	if s.o.Batching == BatchAll {
		return driver.AnyKeys
	}
	return driver.OneGroup
}

// Charge decides one charge.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return quota.Decision{}, err
	}
	p, err := s.plan(c.Limit)
	if err != nil {
		return quota.Decision{}, err
	}
	s.counts(c.Key)
	t := target{plan: p}
	if p.script == nil || c.ID != "" {
		q := &lone{charge: [1]quota.Charge{c}, target: [1]target{t}}
		q.list = list{charges: q.charge[:], targets: q.target[:], indexes: q.index[:0], decisions: q.decision[:], own: true}
		if err := s.decide(ctx, &q.list); err != nil {
			return quota.Decision{}, err
		}
		return q.decision[0], nil
	}
	return s.one(ctx, &c, &t)
}

// one decides a charge without a request id, of an algorithm with Lua.
func (s *Store) one(ctx context.Context, c *quota.Charge, t *target) (quota.Decision, error) {
	if s.o.Batching == BatchNone {
		return s.alone(ctx, c, t)
	}
	return s.gather(ctx, c, t)
}

// ChargeAll decides a list of charges and writes a decision for each to out.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	if len(cs) == 1 && cs[0].ID == "" {
		d, err := s.Charge(ctx, cs[0])
		out[0] = d
		return err
	}
	q := &list{charges: cs, targets: make([]target, len(cs)), decisions: out}
	for i := range cs { // before anything is sent, for Scripted.Lua may panic
		var err error
		if q.targets[i].plan, err = s.plan(cs[i].Limit); err != nil {
			return err
		}
		s.counts(cs[i].Key)
		for j := 0; cs[i].Alternative > 1 && j < i; j++ { // a key has one plan in a call
			if cs[j].Key == cs[i].Key && cs[j].Limit.Handle() == cs[i].Limit.Handle() {
				q.targets[i].plan = q.targets[j].plan
			}
		}
	}
	if s.o.Strict {
		if n := len(s.partsOf(q, s.sameSlot)); n > 1 {
			return fmt.Errorf("redis: %w: the groups of these keys lie in %d slots; accepted: one slot", quota.ErrCrossSlot, n)
		}
	}
	if s.learns() && !s.anyList() { // it may be known once the server is ready
		if err := s.awaitNode(ctx, &cs[0], &q.targets[0]); err != nil {
			return err
		}
	}
	if s.anyList() {
		err := s.decide(ctx, q)
		if err == nil || s.o.Batching == BatchAll || !errors.Is(err, quota.ErrCrossSlot) {
			return err
		}
		// Nothing ran: the server is one of several after all.
	}
	if parts := s.partsOf(q, s.together); len(parts) > 1 {
		if cs[0].Alternative > 0 {
			return fmt.Errorf("redis: %w: the keys of the alternatives may be on several servers", quota.ErrCrossSlot)
		}
		return s.takeSplit(ctx, q, parts)
	}
	return s.decide(ctx, q)
}

// decide decides a list in one step. Its keys must be on one server.
func (s *Store) decide(ctx context.Context, q *list) error {
	for i := range q.charges {
		t := &q.targets[i]
		if t.plan.script == nil {
			return Catch("an algorithm", false, func() error { return s.cas.ChargeAll(ctx, q.charges, q.decisions) })
		}
		s.locate(t, &q.charges[i])
	}
	if s.o.Batching == BatchNone || q.givesBack {
		return s.send(ctx, []queued{{list: q}}, nil)
	}
	return s.gatherList(ctx, q)
}

// run sends a script to the node of its first key, once that is ready: by its SHA if the node is known to have it, else
// with its text. It decides some calls; 0 if it only reads or writes states.
func (s *Store) run(ctx context.Context, sc *script, args []any, keys, calls int) (Reply, error) {
	if s.warmer == nil {
		s.sent(calls)
		return s.invoke(ctx, sc, args, keys)
	}
	key := args[3].(string)
	r, c, err := s.ready(ctx, key)
	if err != nil {
		return nil, err
	}
	if err := s.probed(ctx, r, c, key); err != nil {
		return nil, err
	}
	known := c.knows(sc)
	if !known {
		args[0], args[1] = eval, sc.text
	}
	s.sent(calls)
	reply, err := s.invoke(ctx, sc, args, keys)
	switch {
	case err != nil:
		s.failed(r, c, key, err)
	case args[0] == eval:
		c.learn(sc, known)
	}
	return reply, err
}

// sent counts a script with calls.
func (s *Store) sent(calls int) {
	if calls > 0 {
		s.batches.Add(1)
		s.batched.Add(int64(calls))
	}
}

// invoke sends a script without waiting for a node to be ready. If the node does not know the SHA, and so nothing ran,
// it sends the text.
func (s *Store) invoke(ctx context.Context, sc *script, args []any, keys int) (Reply, error) {
	r, err := s.do(ctx, args, keys)
	if err != nil && IsNoScript(err) {
		args[0], args[1] = eval, sc.text
		r, err = s.do(ctx, args, keys)
	}
	if err != nil && IsNoScript(err) {
		err = ReplyError(err)
	}
	s.heard(err, keys)
	return r, err
}

// do calls the client's Do.
func (s *Store) do(ctx context.Context, args []any, keys int) (r Reply, err error) {
	err = Catch("the client", true, func() (err error) {
		r, err = s.client.Do(ctx, args, keys)
		return err
	})
	return r, err
}

// plan returns the plan of a limit.
func (s *Store) plan(l *quota.Limit) (*plan, error) {
	spec := l.Spec()
	s.mu.RLock()
	p := s.plans[*spec]
	s.mu.RUnlock()
	if p != nil {
		return p, nil
	}
	if err := l.Err(); err != nil {
		return nil, err
	}
	p = &plan{rule: spec.Rule}
	if scripted, ok := l.Algorithm().(driver.Scripted); ok {
		var err error
		if p.script, err = s.scripts.one(spec.Rule, spec.Reads, scripted.Lua()); err != nil {
			return nil, err
		}
		if p.script == nil && !s.crowded.Swap(true) {
			s.notice("rules", fmt.Sprintf("%d rules have scripts, as many as a store keeps on a server; charges under rule %q and further ones "+
				"take several round trips each; accepted: a rule for each algorithm, with its numbers in Spec.Params", maxRules, spec.Rule))
		}
	}
	if listed, ok := l.Algorithm().(driver.Listed); ok {
		p.bytes.Store(int64(numberSize * min(max(listed.MaxTail(), 0), quota.MaxTail)))
	}
	p.header = header(spec.Rule, spec.Unit)
	if err := p.setNumbers(l); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.plans) >= maxPlans { // a program may make specs without end, one a call: forget all plans
		clear(s.plans)
	}
	s.planned++
	p.serial = s.planned
	s.plans[*spec] = p
	return p, nil
}

// fewParams is how many parameters most rules have. A call sends the others only where they are not 0.
const fewParams = 6

func cost(c *quota.Charge) any { return text(min(c.Cost, maxCost)) }

// maxCost stands for every cost and floor above it in a call: it is more than any limit holds, and exact in Lua.
const maxCost = 1 << 52

func (s *Store) appendClock(args []any) []any {
	if s.o.Clock != nil {
		args = append(args, text(s.o.Clock().UnixMicro()))
	}
	return args
}

// target is where a charge goes.
type target struct {
	plan    *plan
	key     string // in Redis; "" until locate
	slot    uint16 // of the key, see slotOf
	slotted bool
}

// locate fills in the key, once a charge.
func (s *Store) locate(t *target, c *quota.Charge) {
	if t.key != "" {
		return
	}
	buf := make([]byte, 0, 128)
	t.key = string(driver.AppendKey(append(buf, s.o.Prefix...), c.Limit.Name(), c.Key))
}

// slotOf returns the slot of a target that has its key. It computes it once.
func (s *Store) slotOf(t *target) uint16 {
	if !t.slotted {
		t.slot, t.slotted = slot(t.key[len(s.o.Prefix):]), true
	}
	return t.slot
}

func (s *Store) sameSlot(a, b *target) bool { return s.slotOf(a) == s.slotOf(b) }

// together reports whether two keys are on one server in any case: in one slot of a cluster, or with one hash tag
// where a proxy may spread keys by a hash of its own.
func (s *Store) together(a, b *target) bool {
	if s.cluster {
		return s.sameSlot(a, b)
	}
	return tag(a.key) == tag(b.key)
}

// tag returns the beginning of a key, with its hash tag. The prefix holds no brace.
func tag(key string) string { return key[:strings.IndexByte(key, '}')] }

// Boxed arguments that most calls have.
var (
	evalSHA any = "evalsha"
	eval    any = "eval"
	none    any = ""
	small       = func() (s [256]any) {
		for i := range s {
			s[i] = strconv.Itoa(i)
		}
		return s
	}()
)

func text[T ~int | ~int64](n T) any {
	if n >= 0 && int64(n) < int64(len(small)) {
		return small[n]
	}
	return strconv.FormatInt(int64(n), 10)
}

// stamp returns the script's time, and whether it is positive. ok is false if n is no number, or no time.
func stamp(n int64, number bool) (now quota.Micros, yes, ok bool) {
	return quota.Micros(max(n, -n)), n > 0, number && n != 0 && exact(n)
}

func badReply(r Reply) error {
	return uncertain("the reply to a script has %d elements, of which some are of the wrong kind; accepted: no proxy that changes replies", r.Len())
}

func differs(p *plan) error {
	return uncertain("the Lua of rule %q decided otherwise than its Go; accepted: an algorithm whose Lua and Go agree", p.rule)
}

var errClosed = fmt.Errorf("redis: the store is %w", quota.ErrClosed)
