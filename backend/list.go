package backend

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A Listing says which keys [List] lists. The zero value is all keys of all limits, without their state.
type Listing struct {
	// Limits are the limits whose keys are listed, each of another name.
	Limits []*quota.Limit
	// LimitFor chooses the limit of a key before Limits do, as that of quota.Options does; nil, or a nil result, chooses none. A
	// limit that is not valid ends the listing with its error.
	// It may be called concurrently.
	//
	// A key is listed if it is kept under the name of the limit that LimitFor chooses, or of one of Limits. Without both, keys
	// of all limits are listed, without their state: that can be told only by a limit's numbers.
	LimitFor func(key string) *quota.Limit
	// Prefix begins the keys: any bytes, which need not end with a segment; "" begins all.
	Prefix string
	// Cursor is the cursor that List returned with the page before; "" begins.
	Cursor string
	// Size is the most keys of a page: 1 to driver.MaxPage; 0 is driver.DefaultPage.
	Size int
}

// Listed is a key that a store holds.
type Listed struct {
	Limit string // the limit's name
	Key   string
	// Decision is the answer to a peek of 0 tokens under the listing's limit: Remaining of Limit tokens are left, and the quota
	// is whole again after ResetAfter. It is the zero value where the listing has no limit, and where Err is not nil.
	Decision quota.Decision
	// Err is why the key has no state that can be told, such as quota.ErrMisconfigured where it is another rule's.
	Err error
}

// List returns a page of the keys that a store holds, with the state of each, and the cursor of the next page; "" for next says
// that the page is the last.
//
//	for cursor := ""; ; {
//		keys, next, err := backend.List(ctx, limiter.Store(), backend.Listing{Limits: []*quota.Limit{tokens}, Prefix: "team-7/", Cursor: cursor})
//		if err != nil {
//			return err
//		}
//		// …
//		if cursor = next; cursor == "" {
//			break
//		}
//	}
//
// A store holds the keys that were charged and whose quota is not whole again, or became so a moment ago. Each key that it holds
// from the first page to the last is listed once at least; a key may come twice, and one that comes or goes meanwhile may or
// may not come. The order is the store's own. A page may have fewer keys than Size, or none, though others follow. Each state is
// right at its own time, Decision.At; those of different keys are of different times.
//
// The store may stand inside policies, leases or other wrappers. The requests go to the store inside as they are, past
// breakers and timeouts: give ctx a deadline. So under a fallback the keys are the store's and not the local ones, and tokens
// that a lease took ahead are taken.
//
// A listing is for people and the pages that they look at, not for the way of a request. In Redis it walks over the whole
// database, with the keys of other programs: SCAN looks at up to 2000 keys a step, in a millisecond of the server's, and then one script
// asks for the states of up to 64 keys. In PostgreSQL it reads the table in the order of its keys, and in memory it holds
// the lock of a 256th of the keys at a time.
//
// List charges nothing. Its errors are those of package quota, or the context's own; a page that failed may be asked for again.
// A cursor that is good no longer, because another server answers than before, is [quota.ErrInvalid]: begin anew. A store that
// cannot list gives an error that is [errors.ErrUnsupported]; a nil store is quota.ErrInvalid.
func List(ctx context.Context, s quota.Store, l Listing) (keys []Listed, next string, err error) {
	if s == nil {
		return nil, "", invalid("the store is nil; accepted: a store, such as limiter.Store()")
	}
	lister, ok := driver.Find[driver.Lister](s)
	if !ok {
		return nil, "", fmt.Errorf("backend: %w: the store lists no keys; accepted: a driver.Lister, such as the stores of local, goredis, rueidis and postgres",
			errors.ErrUnsupported)
	}
	names := map[string]*quota.Limit{}
	q := driver.Listing{Prefix: l.Prefix, Cursor: l.Cursor, Size: l.Size}
	for i, limit := range l.Limits {
		if err := limit.Err(); err != nil {
			return nil, "", fmt.Errorf("backend: Listing.Limits[%d]: %w", i, err)
		}
		if names[limit.Name()] != nil {
			return nil, "", invalid("Listing.Limits has two limits called %s; accepted: each of another name, or LimitFor", limit.Name())
		}
		names[limit.Name()] = limit
		q.Limits = append(q.Limits, limit.Name())
	}
	if l.LimitFor != nil {
		q.Limits = nil
	}
	page, err := lister.List(ctx, q)
	if err != nil {
		return nil, "", err
	}
	var peeks []quota.Charge
	for _, k := range page.Keys {
		limit := names[k.Limit]
		if l.LimitFor != nil {
			if chosen := l.LimitFor(k.Key); chosen != nil {
				if err := chosen.Err(); err != nil {
					return nil, "", fmt.Errorf("backend: Listing.LimitFor chose a limit that is not valid: %w", err)
				}
				if chosen.Name() == k.Limit {
					limit = chosen
				}
			}
		}
		if limit != nil || l.LimitFor == nil && l.Limits == nil {
			keys = append(keys, Listed{Limit: k.Limit, Key: k.Key})
			peeks = append(peeks, quota.Charge{Limit: limit, Key: k.Key, Op: quota.OpPeek})
		}
	}
	if err := peekAll(ctx, lister.(quota.Store), peeks, keys); err != nil {
		return nil, "", err
	}
	return keys, page.Next, nil
}

// peekers is how many keys List peeks at at a time: Redis gathers them.
const peekers = 64

// peekAll fills in the states of the keys. It fails where a peek does for another reason than the key's own state.
func peekAll(ctx context.Context, s quota.Store, peeks []quota.Charge, keys []Listed) error {
	var at atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, min(peekers, len(peeks)))
	for n := range errs {
		all.Go(func() {
			for i := at.Add(1) - 1; int(i) < len(peeks) && errs[n] == nil; i = at.Add(1) - 1 {
				if peeks[i].Limit == nil {
					continue
				}
				keys[i].Decision, keys[i].Err = peek(ctx, s, peeks[i])
				if err := keys[i].Err; err != nil && !errors.Is(err, quota.ErrMisconfigured) {
					errs[n] = err
				}
			}
		})
	}
	all.Wait()
	return cmp.Or(errs...)
}

// peek peeks at a key. An algorithm that panics is an error of the key.
func peek(ctx context.Context, s quota.Store, c quota.Charge) (d quota.Decision, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panics.Error("backend", "the store", v, false)
		}
	}()
	return s.Charge(ctx, c)
}
