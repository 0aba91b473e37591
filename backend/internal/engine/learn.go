package engine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
)

// A script must not hold keys of two servers. But behind a plain address there may be a proxy that routes each
// script by its first key and runs it with the other keys where they are not, or a node of a cluster, which
// refuses it. No handshake tells: proxies answer it themselves. So a store asks from within scripts, which run
// where charges will be decided: 16 scripts with a key each, in 16 parts of the range of slots, return the name that
// the server gave itself when it started. A proxy over N servers of equal size is missed with a probability of
// N^-15 if it spreads keys by a hash of its own; each server with a sixteenth of the slots in one piece is found.
//
// The answer may change: a proxy gets a second server, an address gets another meaning. The store learns again
// after a connection was lost, and with Health.

// reach is a store's knowledge of the servers behind its address.
type reach struct {
	state atomic.Uint32
	due   atomic.Bool  // to be learnt after the next good reply
	next  atomic.Int64 // but not before, in ns since the epoch

	// mu guards the fields below, and changes of state.
	mu      sync.Mutex
	lost    int    // counts the losses of what was known
	crossed bool   // a server refused a script because of several slots: it is not the only one
	told    string // the last notice
	pause   time.Duration
}

// The states of a reach. In unknown and several, keys with different hash tags go in scripts of their own.
const (
	unknown uint32 = iota
	oneServer
	several
)

// Bundler is a Client that can write several scripts with a key each together.
type Bundler interface {
	// DoAll sends scripts to a single server in one round trip, as Do sends each of them. It returns their
	// replies, or the first error.
	DoAll(ctx context.Context, scripts [][]any) ([]Reply, error)
}

const (
	// probes is how many scripts ask.
	probes = 16
	// learnTimeout bounds an attempt at learning.
	learnTimeout = 5 * time.Second
	// learnPause is the pause after an attempt. It doubles up to learnMaxPause while attempts fail.
	learnPause    = time.Second
	learnMaxPause = 30 * time.Second
)

// identityText returns the run_id and the mode of the server that runs it. Valkey calls the mode server_mode where it
// does not pass for Redis.
const identityText = `local i = redis.call('INFO', 'server')
local function field(name) return string.match(i, '[\r\n]' .. name .. ':(%w+)') end
return {field('run_id') or '', field('redis_mode') or field('server_mode') or ''}`

func (r *reach) init(b Batching, cluster bool) {
	if b == BatchAll {
		r.state.Store(oneServer)
	}
	r.due.Store(!cluster && (b == BatchAuto || b == BatchNone))
}

// learns reports whether the store asks the server for its identity.
func (s *Store) learns() bool {
	return !s.cluster && (s.o.Batching == BatchAuto || s.o.Batching == BatchNone)
}

// anyKeys reports whether a script may hold any keys.
func (s *Store) anyKeys() bool { return s.reach.state.Load() == oneServer }

// anyList reports whether a list of any keys is decided in one step.
func (s *Store) anyList() bool { return s.anyKeys() || s.o.Batching == BatchAll }

// learn learns whether one server decides all charges. It returns an error if that is not known afterwards.
func (s *Store) learn(ctx context.Context) error {
	if !s.learns() {
		return nil
	}
	s.reach.mu.Lock()
	lost := s.reach.lost
	s.reach.mu.Unlock()
	ids, mode, err := s.identities(ctx)
	state, text := oneServer, ""
	switch {
	case err != nil && !final(err):
		return err // the callers' own calls tell
	case err != nil:
		state = unknown
		reason, _, _ := strings.Cut(err.Error(), "; accepted")
		text = fmt.Sprintf("the server does not tell whether it is the only one (%s)", reason)
	case ids[""]:
		state, err = unknown, errNoRunID
		text = "the server has no run_id that tells whether it is the only one"
	case len(ids) > 1:
		state = several
		text = fmt.Sprintf("the address leads to %d servers or more", len(ids))
	case mode == "cluster":
		state = several
		text = "the address leads to a node of a cluster"
	case mode != "standalone":
		state, err = unknown, errNoRunID
		text = fmt.Sprintf("the server's mode is %q, and not standalone", mode)
	}
	switch state {
	case unknown:
		text += apart + "; accepted for it: the right +info, or batching=all if there is one server"
	case several:
		text += apart + "; accepted for a cluster: redis+cluster://"
	}
	r := &s.reach
	r.mu.Lock()
	if state == oneServer && r.crossed {
		state, text = several, r.told
	}
	tell := false
	if lost == r.lost { // else the answers may be of another server
		r.state.Store(state)
		tell = text != "" && text != r.told
		if tell || state == oneServer {
			r.told = text
		}
	}
	r.mu.Unlock()
	if tell {
		s.notice("batching", text)
	}
	return err
}

// apart is the part that all notices have in common.
const apart = ": charges to different groups go in scripts of their own, which halves the throughput over many keys"

var errNoRunID = fmt.Errorf("redis: %w: the server does not tell its run_id and mode", quota.ErrMisconfigured)

// final reports whether an error will come again: it is a reply, and not that of a server that cannot serve at the
// moment.
func final(err error) bool {
	_, noReply := errors.AsType[*connectionError](err)
	return !noReply && !panics.Is(err) && !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrOverloaded) &&
		!errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
}

// identities returns the run_ids that the scripts found, and a mode other than standalone if there was one.
func (s *Store) identities(ctx context.Context) (ids map[string]bool, mode string, err error) {
	scripts := make([][]any, probes)
	for i, tag := range probeTags() {
		scripts[i] = []any{eval, identityText, small[1], s.o.Prefix + tag}
	}
	replies, err := s.bundle(ctx, scripts)
	if err != nil {
		if IsNoScript(err) {
			err = ReplyError(err)
		}
		return nil, "", err
	}
	ids = map[string]bool{}
	for i, r := range replies {
		id, ok1 := r.Text(0)
		m, ok2 := r.Text(1)
		if !ok1 || !ok2 {
			return nil, "", errNoRunID
		}
		ids[id] = true
		if i == 0 || m != "standalone" {
			mode = m
		}
	}
	return ids, mode, nil
}

// bundle sends scripts together if the client can, else one after the other.
func (s *Store) bundle(ctx context.Context, scripts [][]any) ([]Reply, error) {
	if b, ok := s.client.(Bundler); ok {
		return b.DoAll(ctx, scripts)
	}
	var replies []Reply
	for _, args := range scripts {
		r, err := s.client.Do(ctx, args, 1)
		if err != nil {
			return nil, err
		}
		replies = append(replies, r)
	}
	return replies, nil
}

// probeTags are hash tags whose slots lie in the sixteenths of the range, one in each.
var probeTags = sync.OnceValue(func() (tags [probes]string) {
	for i, left := 0, probes; left > 0; i++ {
		tag := "{" + strconv.Itoa(i) + "}"
		if p := &tags[slot(tag)/(Slots/probes)]; *p == "" {
			*p = tag
			left--
		}
	}
	return tags
})

// heard draws the conclusions from the outcome of a script with so many keys.
func (s *Store) heard(err error, keys int) {
	if err == nil {
		if s.reach.due.Load() {
			s.learnSoon()
		}
		return
	}
	broken, is := errors.AsType[*connectionError](err)
	switch {
	case keys > 1 && !s.cluster && errors.Is(err, quota.ErrCrossSlot):
		s.crossed()
	case is && broken.timeout: // the client may have dropped the connection
		s.Dialed()
	case is:
		s.Forget()
	}
}

// Dialed is for a new connection beside others. The answer of before holds until the store learns again, soon. It is
// the same for a connection that was dropped after a timeout: a slow server must not get the load of more scripts.
func (s *Store) Dialed() {
	if s.learns() {
		s.reach.due.Store(true)
	}
}

// Forget is for a connection that ended: its successor may lead elsewhere, so the store forgets the answer.
func (s *Store) Forget() {
	if !s.learns() {
		return
	}
	r := &s.reach
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost++
	r.pause = 0
	r.next.Store(0)
	r.state.Store(unknown)
	r.due.Store(true)
}

// learnSoon learns in the background.
func (s *Store) learnSoon() {
	if !s.reach.begin() {
		return
	}
	s.attempts.Run(func() {
		ctx, cancel := context.WithTimeout(s.life, learnTimeout)
		defer cancel()
		s.reach.ended(Catch("the client", true, func() error { return s.learn(ctx) }))
	})
}

// learnReady learns while a server is made ready, so that the first charges after it need not go by hash tag. Without
// an answer they do.
func (s *Store) learnReady(ctx context.Context) {
	if s.reach.begin() {
		s.reach.ended(Catch("the client", true, func() error { return s.learn(ctx) }))
	}
}

// begin reports whether the store is to learn now. Then it must call ended.
func (r *reach) begin() bool {
	return r.due.Load() && time.Now().UnixNano() >= r.next.Load() && r.due.CompareAndSwap(true, false)
}

// ended notes the outcome of an attempt at learning.
func (r *reach) ended(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pause = min(2*r.pause, learnMaxPause)
	if err == nil || final(err) || r.pause == 0 {
		r.pause = learnPause
	}
	r.next.Store(time.Now().Add(r.pause).UnixNano())
	if err != nil && !final(err) {
		r.due.Store(true)
	}
}

// Apart reports whether charges with different hash tags go in scripts of their own.
func (s *Store) Apart() bool { return !s.anyKeys() }

// crossed is for a server that refused keys of several slots, or a proxy before it.
func (s *Store) crossed() {
	const text = "the server refused a script with keys of several slots (CROSSSLOT), of which nothing ran" + apart +
		"; accepted for a cluster: redis+cluster://"
	r := &s.reach
	r.mu.Lock()
	tell := !r.crossed
	r.crossed, r.told = true, text
	r.state.Store(several)
	r.mu.Unlock()
	if tell {
		s.notice("batching", text)
	}
}
