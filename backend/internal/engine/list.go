package engine

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Scanner is a Client that can walk over the keys of a node.
type Scanner interface {
	// Scan sends INFO server and SCAN to a node, in one round trip. node is the name that Placer.Node gave for the slot
	// of the key; "" is a single server. A refusal of INFO is no error. Scan fails as Do does, and with ErrNodeGone where the client
	// has no such node any more.
	Scan(ctx context.Context, node, key string, scan []string) (Scanned, error)
}

// ErrNodeGone is the error of a Scan of which nothing was sent, because the slot has another node.
var ErrNodeGone = fmt.Errorf("redis: %w: nothing was sent: the node of a slot is another one by now", quota.ErrUnavailable)

// Scanned is the reply to a Scan.
type Scanned struct {
	Info   string // of the server; "" if it refused
	Cursor string
	Keys   []string
}

const (
	// scanSteps bounds the steps of one page, and maxScanCount how many keys a step has the server look at.
	scanSteps    = 32
	maxScanCount = 2000
)

// List returns a page of the keys of a server, or of the masters of a cluster one after the other.
//
// A step of SCAN may return more keys than the page has room for. Then the next page asks for the step again, of half the
// size, and leaves out the keys that a page has named since the step began. The server's table may have changed its size
// meanwhile, so that the step is another one: still each page names keys that no page of this step has named.
//
// The cursor of a server means nothing to another one, nor to the same one after a restart, which hashes keys anew. So the
// cursor of a page has the run_id of the server and a sum of the cluster's slots, and is refused when they are others.
func (s *Store) List(ctx context.Context, l driver.Listing) (driver.Page, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return driver.Page{}, err
	}
	if err := l.Check(); err != nil {
		return driver.Page{}, err
	}
	scanner, ok := s.client.(Scanner)
	if !ok || s.reach.state.Load() == several {
		return driver.Page{}, errNoListing
	}
	if strings.HasPrefix(l.Prefix, "/") { // no key begins so, and no slot is its group's
		return driver.Page{}, nil
	}
	at, err := parseMark(l.Cursor)
	if err != nil {
		return driver.Page{}, err
	}
	nodes, sum, err := s.mastersOf(ctx, l.Prefix, at.slots)
	if err != nil {
		return driver.Page{}, err
	}
	if l.Cursor == "" {
		at = mark{node: nodes[0].name, cursor: "0", slots: sum}
	}
	n := slices.IndexFunc(nodes, func(n master) bool { return n.name == at.node })
	if n < 0 || at.slots != sum {
		return driver.Page{}, moved(l.Cursor)
	}
	if at.count == 0 {
		at.count = max(1, l.Size-l.Size/8) // a step may return some keys more
	}
	pattern := s.pattern(&l)
	var page driver.Page
	for step := 0; ; step++ {
		got, err := s.scan(ctx, scanner, nodes[n], []string{"scan", at.cursor, "match", pattern, "count", strconv.Itoa(at.count)})
		if err != nil {
			return driver.Page{}, cmp.Or(s.sameMasters(ctx, &l, sum), err)
		}
		if run := infoField(got.Info, "run_id"); at.run == "" {
			at.run = run
		} else if at.run != run {
			return driver.Page{}, driver.BadCursor(l.Cursor, `"", to begin anew: the server is another one than before, or was restarted`)
		}
		if full := s.add(&page, &l, &at, got); full {
			page.Next = at.format()
			return page, nil
		}
		at = mark{node: at.node, run: at.run, slots: sum, cursor: got.Cursor, count: min(2*at.count, maxScanCount)}
		if at.cursor == "0" {
			// The slots are compared when a node is done: one that moved from a later node to this one would be missed.
			if err := s.sameMasters(ctx, &l, sum); err != nil {
				return driver.Page{}, err
			}
			if n++; n == len(nodes) {
				return page, nil
			}
			at = mark{node: nodes[n].name, slots: sum, cursor: "0", count: at.count}
		}
		if len(page.Keys) > 0 || step == scanSteps {
			at.count = 0
			page.Next = at.format()
			return page, nil
		}
	}
}

var errNoListing = fmt.Errorf("redis: %w: the address leads to several servers, or to a node of a cluster; accepted: one server, or redis+cluster://", errors.ErrUnsupported)

// moved is the error of a cursor that the slots have outdated.
func moved(cursor string) error {
	return driver.BadCursor(cursor, `"", to begin anew: slots of the cluster have another node since the listing began`)
}

// sameMasters fails if slots have another node than when the listing began.
func (s *Store) sameMasters(ctx context.Context, l *driver.Listing, sum uint64) error {
	if _, now, err := s.mastersOf(ctx, l.Prefix, 0); err != nil || now == sum {
		return err
	}
	return moved(l.Cursor)
}

// add adds the keys of a step to the page, but for those that earlier pages named. full says that they are more than it has
// room for; the mark then stays at the step, of half the size.
func (s *Store) add(page *driver.Page, l *driver.Listing, at *mark, got Scanned) (full bool) {
	for _, text := range got.Keys {
		rest, ours := strings.CutPrefix(text, s.o.Prefix)
		k, ok := driver.ParseKey(rest)
		if !ours || !ok || !l.Has(k) {
			continue
		}
		sum := sha256.Sum256([]byte(rest))
		id := hex.EncodeToString(sum[:8])
		if slices.Contains(at.seen, id) {
			continue
		}
		if len(page.Keys) == l.Size {
			at.count = max(1, at.count/2)
			return true
		}
		page.Keys = append(page.Keys, k)
		at.seen = append(at.seen, id)
	}
	return false
}

// pattern returns a pattern that the keys of a listing have. Others may have it too: where a byte that is no UTF-8 stands, or a
// backslash, it takes any, for miniredis makes a regular expression of the pattern, and panics on those.
func (s *Store) pattern(l *driver.Listing) string {
	text := driver.AppendPrefix([]byte(s.o.Prefix), l.Prefix)
	pattern := make([]byte, 0, len(text)+16)
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		switch {
		case r == utf8.RuneError && size == 1:
			pattern = append(pattern, '*')
		case r == '\\':
			pattern = append(pattern, '?')
		case strings.ContainsRune("*?[]", r):
			pattern = append(pattern, '\\', byte(r))
		default:
			pattern = append(pattern, text[:size]...)
		}
		text = text[size:]
	}
	if len(l.Limits) == 1 {
		return string(append(pattern, "*:"+l.Limits[0]...))
	}
	return string(append(pattern, "*:*"...))
}

// scan asks a node, once it is ready.
func (s *Store) scan(ctx context.Context, scanner Scanner, m master, args []string) (got Scanned, err error) {
	if s.warmer != nil {
		if _, _, err := s.ready(ctx, m.key); err != nil {
			return got, err
		}
	}
	err = Catch("the client", false, func() (err error) {
		got, err = scanner.Scan(ctx, m.name, m.key, args)
		return err
	})
	return got, ofRead(err)
}

// mark is a place in a listing: a node of a server's run, and the cursor of the next step there.
type mark struct {
	node, run string
	slots     uint64
	cursor    string
	count     int      // of the step; 0 is that of a page's first one
	seen      []string // hashes of the step's keys that earlier pages named
}

func (m *mark) format() string {
	text := strings.Join([]string{m.node, m.run, strconv.FormatUint(m.slots, 36), m.cursor, strconv.Itoa(m.count), strings.Join(m.seen, " ")}, "\n")
	return base64.RawURLEncoding.EncodeToString([]byte(text))
}

func parseMark(cursor string) (m mark, err error) {
	if cursor == "" {
		return m, nil
	}
	text, err := base64.RawURLEncoding.DecodeString(cursor)
	fields := strings.Split(string(text), "\n") // a stored key has no control bytes
	if err == nil && len(fields) == 6 {
		var err2 error
		m = mark{node: fields[0], run: fields[1], cursor: fields[3], seen: strings.Fields(fields[5])}
		m.slots, err = strconv.ParseUint(fields[2], 36, 64)
		m.count, err2 = strconv.Atoi(fields[4])
		if _, err3 := strconv.ParseUint(m.cursor, 10, 64); err == nil && err2 == nil && err3 == nil && 0 <= m.count && m.count <= maxScanCount {
			return m, nil
		}
	}
	return mark{}, driver.BadCursor(cursor, "Page.Next of the page before")
}

// master is a node with keys, and a key that it would have.
type master struct{ name, key string }

// placement is the masters of a cluster and the sum of their slots.
type placement struct {
	nodes []master
	sum   uint64
}

// mastersOf returns the nodes that have keys with a prefix, by name, and a sum of the slots that each has. Where the sum is
// known, as within the keys of a node, the nodes are those of that sum: to ask for each slot takes milliseconds.
func (s *Store) mastersOf(ctx context.Context, prefix string, known uint64) (nodes []master, sum uint64, err error) {
	if s.placer == nil {
		return []master{{"", s.o.Prefix + "{list}"}}, 0, nil
	}
	if group := quota.Group(prefix); len(group) < len(prefix) { // all keys are in one slot
		key := s.o.Prefix + string(driver.AppendGroup(nil, group))
		if s.warmer != nil {
			if _, _, err := s.ready(ctx, key); err != nil {
				return nil, 0, err
			}
		}
		return []master{{s.placer.Node(SlotOf(key)), key}}, 0, nil
	}
	if m := s.placed.Load(); m != nil && m.sum == known {
		return m.nodes, m.sum, nil
	}
	if nodes, sum = s.masters(); nodes != nil {
		return nodes, sum, nil
	}
	if s.warmer != nil { // which makes the client of a cluster
		if err := s.await(ctx, &s.unnamed, s.o.Prefix+"{list}"); err != nil {
			return nil, 0, err
		}
	}
	if err := s.placer.Refresh(ctx); err != nil {
		return nil, 0, err
	}
	if nodes, sum = s.masters(); nodes == nil {
		return nil, 0, fmt.Errorf("redis: %w: some slots of the cluster have no node that is known", quota.ErrUnavailable)
	}
	return nodes, sum, nil
}

// masters returns the nodes as they are known, or nil if a slot's is not.
func (s *Store) masters() (nodes []master, sum uint64) {
	h := fnv.New64a()
	seen := map[string]bool{}
	for slot := range uint16(Slots) {
		name := s.placer.Node(slot)
		if name == "" {
			return nil, 0
		}
		h.Write([]byte(name + "\n"))
		if !seen[name] {
			seen[name] = true
			nodes = append(nodes, master{name, s.o.Prefix + SlotTags()[slot]})
		}
	}
	slices.SortFunc(nodes, func(a, b master) int { return strings.Compare(a.name, b.name) })
	s.placed.Store(&placement{nodes, h.Sum64()})
	return nodes, h.Sum64()
}

// SlotTags has a hash tag for each slot.
var SlotTags = sync.OnceValue(func() (tags *[Slots]string) {
	tags = new([Slots]string)
	for i, left := 0, len(tags); left > 0; i++ {
		tag := "{" + strconv.Itoa(i) + "}"
		if slot := SlotOf(tag); tags[slot] == "" {
			tags[slot] = tag
			left--
		}
	}
	return tags
})
